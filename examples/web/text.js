/** Text to token ids and back. */

import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
import { PageError } from "./errors.js";

/** What tokenizers write for bytes that are no character, or not yet. */
const NO_CHARACTERS = /\uFFFD+$/;

/** A Hugging Face `tokenizer.json`. */
export class TextCodec {
  #tokenizer;

  /**
   * @param {object} tokenizer what stands in `tokenizer.json`.
   * @param {object} config what stands in `tokenizer_config.json`.
   * @throws {PageError} the library does not know such a tokenizer.
   */
  constructor(tokenizer, config) {
    try {
      this.#tokenizer = new Tokenizer(tokenizer, config);
    } catch (error) {
      const { message } = error;
      throw new PageError(`tokenizer.json: expected one that @huggingface/tokenizers reads, found: ${message}`);
    }
  }

  /** The text's token ids, with the special tokens that the tokenizer adds by itself. */
  encode(text) {
    return this.#tokenizer.encode(text).ids;
  }

  /** A new, empty text that grows token by token. */
  growingText() {
    return new GrowingText(this.#tokenizer);
  }
}

/** Text that grows token by token, in whole characters; special tokens are left out. */
class GrowingText {
  #tokenizer;
  #tokenIds = [];
  #text = "";

  constructor(tokenizer) {
    this.#tokenizer = tokenizer;
  }

  /** The characters that a token makes certain, possibly none. */
  push(tokenId) {
    this.#tokenIds.push(tokenId);
    // Spaces stay as the model wrote them, as in the Python runtime.
    const options = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
    const whole = this.#tokenizer.decode(this.#tokenIds, options).replace(NO_CHARACTERS, "");
    const piece = whole.slice(this.#text.length);
    this.#text += piece;
    return piece;
  }
}
