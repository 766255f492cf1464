/**
 * Serves this folder on localhost:
 *
 *     node serve.mjs [--port 8000] [--bundle bundle]
 *
 * `--bundle` is another folder to serve as `bundle/`; port 0 takes a free one. Prints its address, then a line for each
 * answer: status and path, percent-encoded, so that no request can print a line of its own.
 *
 * Only this machine's browsers are answered, under the names of this machine: a page of another site, whose name was made
 * to lead here, is not. Links that lead out of the two folders are not followed.
 */

import { constants } from "node:fs";
import { open, realpath } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize, sep } from "node:path";
import { pipeline } from "node:stream/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const ROOT = fileURLToPath(new URL(".", import.meta.url));
const TYPES = {
  ".css": "text/css; charset=utf-8",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".json": "application/json",
  ".mjs": "text/javascript; charset=utf-8",
  ".wasm": "application/wasm",
};
const HEADERS = {
  // Browsers give WebAssembly threads to isolated pages alone.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
  // Asked for each time, sent again only when changed.
  "Cache-Control": "no-cache",
  "X-Content-Type-Options": "nosniff",
};

const { values: options } = parseArgs({
  options: { port: { type: "string", default: "8000" }, bundle: { type: "string", default: join(ROOT, "bundle") } },
});

/** This machine's names, with any port. */
const HOST = /^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/i;

/** The decoded path of an address, or null where it is none. */
function decoded(path) {
  try {
    return decodeURIComponent(path);
  } catch {
    return null;
  }
}

/** The file that a decoded path names, without links, or null where it leads out of what is served. */
async function fileOf(path) {
  const folder = path.startsWith("/bundle/") ? options.bundle : ROOT;
  const relative = normalize(path.replace(/^\/bundle\//, "/").replace(/\/$/, "/index.html"));
  if (!relative.startsWith(sep) || relative.includes("\0") || relative.split(sep).includes("..")) return null;
  try {
    const [root, file] = await Promise.all([realpath(folder), realpath(join(folder, relative))]);
    return file.startsWith(root + sep) ? file : null;
  } catch {
    return null;
  }
}

/** A regular file, opened once: what is looked at is what is sent. */
async function openRegular(file) {
  const flags = constants.O_RDONLY | (constants.O_NONBLOCK ?? 0) | (constants.O_NOFOLLOW ?? 0);
  const handle = file && (await open(file, flags).catch(() => null));
  if (!handle) return null;
  const found = await handle.stat();
  if (found.isFile()) return { handle, found };
  await handle.close();
  return null;
}

async function answer(request, response) {
  const address = new URL(request.url, "http://localhost").pathname;
  const path = decoded(address);
  const file = path && (await fileOf(path));
  const opened = await openRegular(file);
  try {
    const tag = opened && `"${opened.found.size}-${opened.found.mtimeMs}"`;
    let status = 200;
    if (!HOST.test(request.headers.host ?? "")) status = 421;
    else if (!["GET", "HEAD"].includes(request.method)) status = 405;
    else if (!opened) status = 404;
    else if (request.headers["if-none-match"] === tag) status = 304;
    console.log(`${status} ${address}`);
    if (status !== 200) {
      response.writeHead(status, HEADERS).end();
      return;
    }
    const type = TYPES[extname(file)] ?? "application/octet-stream";
    response.writeHead(status, { ...HEADERS, ETag: tag, "Content-Type": type, "Content-Length": opened.found.size });
    if (request.method === "HEAD") response.end();
    else await pipeline(opened.handle.createReadStream({ autoClose: false }), response);
  } finally {
    await opened?.handle.close();
  }
}

const server = createServer((request, response) => {
  // A browser that goes away in the middle, or an address that is none, is no reason to stop.
  answer(request, response).catch(() => response.destroy());
});
server.listen(Number(options.port), "127.0.0.1", () => console.log(`http://localhost:${server.address().port}/`));
