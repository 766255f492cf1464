/** The frozen model and its tasks: one graph, opened once, and a prefix for each task, fetched when it is chosen. */

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { Bundle, layersOf } from "./bundle.js";
import { PageError } from "./errors.js";
import { readPrefix } from "./prefix.js";
import { TextCodec } from "./text.js";

const MAX_NEW_TOKENS = 256;
// Errors alone: it warns of an input of the graph that may be left out.
const SESSION_OPTIONS = { executionProviders: ["wasm"], logSeverityLevel: 3 };
ort.env.logLevel = "error";

/** Generates text under a task; made by `Engine.open`. */
export class Engine {
  #bundle;
  #session;
  #codec;
  #endTokens;
  #prefixes = new Map();

  constructor(bundle, session, codec, endTokens) {
    this.#bundle = bundle;
    this.#session = session;
    this.#codec = codec;
    this.#endTokens = endTokens;
  }

  /**
   * Fetch a bundle's graph and tokenizer and open them.
   *
   * @param {URL} url of the bundle's folder, with a slash at its end.
   * @returns {Promise<Engine>}
   * @throws {PageError} the bundle is not whole, or not one that runs here.
   */
  static async open(url) {
    const bundle = await Bundle.open(url);
    const [graph, tokenizer, tokenizerConfig, endTokens] = await Promise.all([
      bundle.read(bundle.manifest.graph),
      bundle.readJson("tokenizer.json"),
      bundle.has("tokenizer_config.json") ? bundle.readJson("tokenizer_config.json") : {},
      readEndTokens(bundle),
    ]);
    const codec = new TextCodec(tokenizer, tokenizerConfig);
    let session;
    try {
      session = await ort.InferenceSession.create(new Uint8Array(graph), SESSION_OPTIONS);
    } catch (error) {
      throw new PageError(`${bundle.manifest.graph}: onnxruntime cannot open the graph: ${error.message}`);
    }
    return new Engine(bundle, session, codec, endTokens);
  }

  /** The bundle's manifest. */
  get manifest() {
    return this.#bundle.manifest;
  }

  /**
   * A task's prefix as the graph's initial past, fetched once.
   *
   * @param {string} task its name.
   * @returns {Promise<{past: object, length: number, positionBase: number, size: number, milliseconds: number,
   *   isKept: boolean}>} milliseconds from the request until the tensors were ready; whether the browser had kept it.
   * @throws {PageError} the file is missing or damaged, or does not fit the model.
   */
  prefix(task) {
    if (!this.#prefixes.has(task)) {
      const loading = this.#loadPrefix(this.manifest.tasks[task]);
      this.#prefixes.set(task, loading);
      // What failed may be there the next time.
      loading.catch(() => this.#prefixes.delete(task));
    }
    return this.#prefixes.get(task);
  }

  /**
   * Continue a prompt greedily.
   *
   * @param {string} prompt
   * @param {string | null} task null runs the bare model.
   * @yields {{text: string, reason: string | null, milliseconds: number}} for each new token the characters that became
   *   certain, why the text ends ("end token" or "length") or null, and what it took to compute.
   * @throws {PageError} the prompt is empty or too long.
   */
  async *generate(prompt, task) {
    const prefix = task === null ? this.#noPrefix() : await this.prefix(task);
    let started = performance.now();
    let tokenIds = prompt ? this.#codec.encode(prompt) : [];
    if (!tokenIds.length) throw new PageError("prompt: expected text, found none");
    const room = this.#room(prefix) - tokenIds.length;
    if (room < 1) {
      throw new PageError(
        `prompt: expected at most ${this.#room(prefix) - 1} tokens, as the context holds ${this.manifest.max_length} ` +
          `and the prefix takes ${prefix.length}, found ${tokenIds.length}; shorten it`,
      );
    }
    const text = this.#codec.growingText();
    let { past, length, positionBase: position } = prefix;
    for (let left = Math.min(MAX_NEW_TOKENS, room); left > 0; left--) {
      const { logits, present } = await this.#run(tokenIds, past, length, position);
      length += tokenIds.length;
      position += tokenIds.length;
      past = present;
      tokenIds = [largest(logits)];
      const reason = this.#endTokens.has(tokenIds[0]) ? "end token" : left === 1 ? "length" : null;
      const piece = text.push(tokenIds[0]);
      const milliseconds = performance.now() - started;
      yield { text: piece, reason, milliseconds };
      if (reason) return;
      started = performance.now();
    }
  }

  async #loadPrefix(task) {
    const started = performance.now();
    const { buffer, isKept } = await this.#bundle.fetch(task.file);
    const { length, positionBase, layers } = readPrefix(buffer, task, this.manifest);
    const past = this.#past(layers, length);
    return { past, length, positionBase, size: task.file.size, milliseconds: performance.now() - started, isKept };
  }

  #noPrefix() {
    const nothing = { key: new Float32Array(0), value: new Float32Array(0) };
    return { past: this.#past(layersOf(this.manifest).map(() => nothing), 0), length: 0, positionBase: 0 };
  }

  /** Keys and values as the graph's inputs, each [1, num_key_value_heads, length, head_dim]. */
  #past(layers, length) {
    const past = {};
    for (const [index, { key_value_heads: heads, head_dim: headDim }] of layersOf(this.manifest).entries()) {
      for (const part of ["key", "value"]) {
        const shape = [1, heads, length, headDim];
        past[`past_key_values.${index}.${part}`] = new ort.Tensor("float32", layers[index][part], shape);
      }
    }
    return past;
  }

  /** Tokens of prompt and new text that fit behind a prefix. */
  #room({ length, positionBase }) {
    return Math.min(this.manifest.max_length - length, this.manifest.geometry.context_length - positionBase);
  }

  /**
   * The last token's logits, and past and new keys and values as the next run's past.
   *
   * Of a prompt the graph gives every token's logits: onnxruntime-web takes no inputs that may be left out, and so not
   * `num_logits_to_keep`.
   */
  async #run(tokenIds, past, length, position) {
    const count = tokenIds.length;
    const results = await this.#session.run({
      input_ids: integers(tokenIds),
      attention_mask: integers(new Array(length + count).fill(1)),
      position_ids: integers(tokenIds.map((_, index) => position + index)),
      ...past,
    });
    const present = {};
    for (const name of Object.keys(past)) present[name] = results[name.replace("past_key_values", "present")];
    return { logits: results.logits.data.subarray(-this.manifest.geometry.vocab_size), present };
  }
}

/** The end tokens of generation_config.json, or of config.json where that names none. */
async function readEndTokens(bundle) {
  for (const path of ["generation_config.json", "config.json"]) {
    const { eos_token_id: found } = bundle.has(path) ? await bundle.readJson(path) : {};
    if (found !== undefined && found !== null) return new Set([found].flat());
  }
  return new Set();
}

function integers(values) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

function largest(logits) {
  let best = 0;
  for (let index = 1; index < logits.length; index++) {
    if (logits[index] > logits[best]) best = index;
  }
  return best;
}
