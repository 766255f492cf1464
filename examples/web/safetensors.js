/** Reads safetensors files of float32 and float16, and refuses what is not whole. */

import { PageError } from "./errors.js";

// A prefix has two tensors a layer: a longer header is not of one, and is refused before it is parsed.
const MAX_HEADER_BYTES = 16 << 20;
const ITEM_BYTES = { F32: 4, F16: 2 };

/**
 * The tensors of a file, float16 widened to float32.
 *
 * Source: the safetensors format: 8 bytes, the header's length, little-endian; the header, a JSON object; the tensors,
 * one behind the other without a gap, until the file's end.
 *
 * @param {ArrayBuffer} buffer the whole file.
 * @param {string} where names it in messages.
 * @returns {{metadata: Object<string, string>, tensors: Map<string, {shape: number[], data: Float32Array}>}}
 * @throws {PageError} the file is truncated, of another kind, or holds other numbers.
 */
export function readSafetensors(buffer, where) {
  const { header, dataStart } = readHeader(buffer, where);
  const { __metadata__: metadata = {}, ...entries } = header;
  if (!isObject(metadata)) throw new PageError(`${where}: expected metadata of texts, found ${typeof metadata}`);
  const listed = Object.entries(entries).map(([name, entry]) => checkEntry(name, entry, where));
  listed.sort((left, right) => left.start - right.start || left.stop - right.stop);
  let end = 0;
  for (const { name, start, stop } of listed) {
    if (start !== end) throw new PageError(`${where}: ${name}: expected its numbers at byte ${end}, found ${start}`);
    end = stop;
  }
  const found = buffer.byteLength - dataStart;
  if (end !== found) throw new PageError(`${where}: expected ${end} bytes of tensors, found ${found}`);
  const tensors = new Map();
  for (const { name, dtype, shape, start, stop } of listed) {
    // A copy: a view would have to begin at a multiple of the number's size, which the format does not promise.
    const bytes = buffer.slice(dataStart + start, dataStart + stop);
    const data = dtype === "F32" ? new Float32Array(bytes) : Float32Array.from(new Uint16Array(bytes), widen);
    tensors.set(name, { shape, data });
  }
  return { metadata, tensors };
}

function readHeader(buffer, where) {
  const room = buffer.byteLength - 8;
  if (room < 0) throw new PageError(`${where}: expected a safetensors file, found ${buffer.byteLength} bytes`);
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  if (length > Math.min(room, MAX_HEADER_BYTES)) {
    throw new PageError(`${where}: expected a safetensors file, found a header of ${length} in ${room + 8} bytes`);
  }
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(buffer, 8, length)));
  } catch {
    header = null;
  }
  if (!isObject(header)) throw new PageError(`${where}: expected a JSON object as its header, found none`);
  return { header, dataStart: 8 + length };
}

function checkEntry(name, entry, where) {
  const { dtype, shape, data_offsets: offsets } = isObject(entry) ? entry : {};
  if (!Object.hasOwn(ITEM_BYTES, dtype)) throw new PageError(`${where}: ${name}: expected F32 or F16, found ${dtype}`);
  if (!isListOfCounts(shape) || !isListOfCounts(offsets) || offsets.length !== 2) {
    throw new PageError(`${where}: ${name}: expected a shape and two offsets, found ${shape} and ${offsets}`);
  }
  const [start, stop] = offsets;
  const expected = shape.reduce((product, size) => product * size, ITEM_BYTES[dtype]);
  if (stop - start !== expected) {
    throw new PageError(`${where}: ${name}: expected ${expected} bytes for shape [${shape}], found ${stop - start}`);
  }
  return { name, dtype, shape, start, stop };
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isListOfCounts(value) {
  return Array.isArray(value) && value.every((item) => Number.isSafeInteger(item) && item >= 0);
}

/** The number that 16 bits of IEEE 754 binary16 stand for; not every browser has Float16Array. */
function widen(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
