/** A bundle on the server: its manifest, and the files that it lists, each fetched once and kept by its hash. */

import { PageError } from "./errors.js";

const CACHE = "prefix-export-bundle";
/** What this page runs, by the manifest's fields, and how such a bundle is built. */
const RUNS = { mode: "feed", flavour: "portable", target: "web", cache: "fp32" };
const HOW = "build it with --target web --mode feed --precision int8";

/** The files of one bundle. */
export class Bundle {
  /**
   * @param {URL} url of the folder, with a slash at its end.
   * @param {object} manifest its manifest, checked.
   */
  constructor(url, manifest) {
    this.url = url;
    this.manifest = manifest;
  }

  /**
   * Read a bundle's manifest, and let go of kept files that it no longer lists.
   *
   * @param {URL} url of the folder, with a slash at its end.
   * @returns {Promise<Bundle>}
   * @throws {PageError} the manifest is missing, or of a bundle that this page does not run.
   */
  static async open(url) {
    const response = await get(new URL("manifest.json", url), "manifest.json", "build a bundle first, see README.md");
    let manifest;
    try {
      manifest = await response.json();
    } catch {
      throw new PageError("manifest.json: expected JSON, found text that is none");
    }
    checkManifest(manifest);
    const bundle = new Bundle(url, manifest);
    await bundle.#prune();
    return bundle;
  }

  /** Whether the manifest lists a file of this path. */
  has(path) {
    return this.manifest.files.some((entry) => entry.path === path);
  }

  /** The bytes of a file that belongs to no task, by its path. */
  async read(path) {
    const entry = this.manifest.files.find((file) => file.path === path);
    if (!entry) throw new PageError(`manifest.json: expected a file ${path}, found none; ${HOW}`);
    return (await this.fetch(entry)).buffer;
  }

  /** The JSON object in a file, by its path. */
  async readJson(path) {
    try {
      return JSON.parse(new TextDecoder().decode(await this.read(path)));
    } catch (error) {
      if (error instanceof PageError) throw error;
      throw new PageError(`${path}: expected JSON, found text that is none`);
    }
  }

  /**
   * The bytes of a file: those kept, or fetched, compared with the manifest and kept from then on.
   *
   * @param {{path: string, size: number, sha256: string}} entry the manifest's.
   * @returns {Promise<{buffer: ArrayBuffer, isKept: boolean}>}
   * @throws {PageError} the file is missing or damaged.
   */
  async fetch(entry) {
    const url = this.#address(entry);
    const cache = await caches.open(CACHE);
    const kept = await cache.match(url);
    if (kept) return { buffer: await kept.arrayBuffer(), isKept: true };
    const response = await get(url, entry.path, "copy the whole bundle to the server");
    const buffer = await response.arrayBuffer();
    await checkContent(buffer, entry);
    // A full disk only means that the file is fetched again.
    await cache.put(url, new Response(buffer)).catch(() => undefined);
    return { buffer, isKept: false };
  }

  /** A file's address names its content, so that what is kept is never stale. */
  #address(entry) {
    const path = entry.path.split("/").map(encodeURIComponent).join("/");
    return new URL(`${path}?sha256=${entry.sha256}`, this.url).href;
  }

  async #prune() {
    const { files, tasks } = this.manifest;
    const entries = [...files, ...Object.values(tasks).map((task) => task.file)];
    const listed = new Set(entries.map((entry) => this.#address(entry)));
    const cache = await caches.open(CACHE);
    for (const request of await cache.keys()) {
      if (!listed.has(request.url)) await cache.delete(request);
    }
  }
}

async function get(url, path, advice) {
  let response;
  try {
    response = await fetch(url, { mode: "same-origin" });
  } catch {
    throw new PageError(`${path}: expected it from the server, found no connection, and it was not kept before`);
  }
  if (!response.ok) throw new PageError(`${path}: expected a file, found HTTP ${response.status}; ${advice}`);
  return response;
}

async function checkContent(buffer, { path, size, sha256 }) {
  if (buffer.byteLength !== size) {
    throw new PageError(`${path}: expected ${size} bytes, found ${buffer.byteLength}; copy the bundle again`);
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== sha256) {
    throw new PageError(
      `${path}: expected SHA-256 ${sha256.slice(0, 12)}…, found ${found.slice(0, 12)}…; copy the bundle again`,
    );
  }
}

function checkManifest(manifest) {
  const { format, format_version: version } = manifest ?? {};
  if (format !== "prefix-export.bundle") {
    throw new PageError(`manifest.json: format: expected prefix-export.bundle, found ${format}`);
  }
  if (version !== 1 && version !== 2) {
    throw new PageError(`manifest.json: format_version: expected 1 or 2, found ${version}; update this page`);
  }
  for (const [field, expected] of Object.entries(RUNS)) {
    if (manifest[field] !== expected) {
      throw new PageError(`manifest.json: ${field}: expected ${expected}, found ${manifest[field]}; ${HOW}`);
    }
  }
  const { files, tasks, geometry, max_length: maxLength } = manifest;
  const parts = {
    files: Array.isArray(files) && files.every(isFile),
    tasks: Object.values(tasks ?? [null]).every(isTask),
    geometry: layersOf(manifest)?.length > 0 && isCount(geometry.context_length, 1) && isCount(geometry.vocab_size, 1),
    max_length: isCount(maxLength, 1),
  };
  for (const [field, isGood] of Object.entries(parts)) {
    if (!isGood) throw new PageError(`manifest.json: ${field}: expected what the format says, found something else`);
  }
}

/** The decoder's layers. The first format version lists no others, later ones list them by attention site. */
export function layersOf({ geometry }) {
  return geometry?.sites ? geometry.sites.decoder : geometry?.layers;
}

function isFile(entry) {
  return isInside(entry?.path) && isCount(entry.size) && /^[0-9a-f]{64}$/.test(entry.sha256);
}

/** Whether a path stays inside the bundle: neither another origin nor a folder above. */
function isInside(path) {
  if (typeof path !== "string" || /[\\:\0]/.test(path) || !path.isWellFormed()) return false;
  return path.split("/").every((part) => !["", ".", ".."].includes(part));
}

function isTask(task) {
  return isFile(task?.file) && isCount(task.prefix_length, 1) && isCount(task.position_base);
}

function isCount(value, least = 0) {
  return Number.isSafeInteger(value) && value >= least;
}
