/** A task's prefix: keys and values for every layer of the frozen model, from its canonical file. */

import { layersOf } from "./bundle.js";
import { PageError } from "./errors.js";
import { readSafetensors } from "./safetensors.js";

const FORMAT = "prefix-export.prefix";
const FORMAT_VERSION = "1";

/**
 * The prefix in a file, if it is the manifest's and fits the model.
 *
 * @param {ArrayBuffer} buffer the whole file.
 * @param {{file: {path: string}, prefix_length: number, position_base: number}} task the manifest's entry.
 * @param {{geometry: object, model: object}} manifest the bundle's.
 * @returns {{length: number, positionBase: number, layers: {key: Float32Array, value: Float32Array}[]}} each key and
 *   value is [num_key_value_heads, prefix_length, head_dim].
 * @throws {PageError} naming what was expected and found.
 */
export function readPrefix(buffer, task, manifest) {
  const where = task.file.path;
  const { metadata, tensors } = readSafetensors(buffer, where);
  const expected = { format: FORMAT, format_version: FORMAT_VERSION, position_base: String(task.position_base) };
  if (metadata.base_fingerprint) expected.base_fingerprint = manifest.model.fingerprint;
  for (const [name, value] of Object.entries(expected)) {
    if (metadata[name] !== value) throw new PageError(`${where}: ${name}: expected ${value}, found ${metadata[name]}`);
  }
  const layers = layersOf(manifest).map(({ key_value_heads: heads, head_dim: headDim }, index) => {
    const shape = [heads, task.prefix_length, headDim];
    return {
      key: takeTensor(tensors, `decoder.${index}.key`, shape, where),
      value: takeTensor(tensors, `decoder.${index}.value`, shape, where),
    };
  });
  if (tensors.size !== 2 * layers.length) {
    throw new PageError(`${where}: expected ${2 * layers.length} tensors, found ${tensors.size}`);
  }
  return { length: task.prefix_length, positionBase: task.position_base, layers };
}

function takeTensor(tensors, name, shape, where) {
  const tensor = tensors.get(name);
  if (String(tensor?.shape) !== String(shape)) {
    const found = tensor ? `[${tensor.shape.join(", ")}]` : "none";
    throw new PageError(`${where}: ${name}: expected shape [${shape.join(", ")}], found ${found}`);
  }
  if (!tensor.data.every(Number.isFinite)) throw new PageError(`${where}: ${name}: expected finite numbers`);
  return tensor.data;
}
