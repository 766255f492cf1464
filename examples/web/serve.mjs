/**
 * Serves this folder on localhost:
 *
 *     node serve.mjs [--port 8000] [--bundle bundle]
 *
 * `--bundle` is another folder to serve as `bundle/`; port 0 takes a free one. Prints its address, then a line for each
 * answer: status and path.
 */

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
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

/** The file that a path of the address names, or null where it leads out of what is served. */
function fileOf(path) {
  const folder = path.startsWith("/bundle/") ? options.bundle : ROOT;
  const relative = normalize(path.replace(/^\/bundle\//, "/").replace(/\/$/, "/index.html"));
  const isInside = relative.startsWith(sep) && !relative.includes("\0") && !relative.split(sep).includes("..");
  return isInside ? join(folder, relative) : null;
}

async function answer(request, response) {
  const path = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
  const file = fileOf(path);
  const found = file && (await stat(file).catch(() => null));
  const tag = found && `"${found.size}-${found.mtimeMs}"`;
  let status = 200;
  if (!["GET", "HEAD"].includes(request.method)) status = 405;
  else if (!found?.isFile()) status = 404;
  else if (request.headers["if-none-match"] === tag) status = 304;
  console.log(`${status} ${path}`);
  if (status !== 200) {
    response.writeHead(status, HEADERS).end();
    return;
  }
  const type = TYPES[extname(file)] ?? "application/octet-stream";
  response.writeHead(status, { ...HEADERS, ETag: tag, "Content-Type": type, "Content-Length": found.size });
  if (request.method === "HEAD") response.end();
  else await pipeline(createReadStream(file), response);
}

const server = createServer((request, response) => {
  // A browser that goes away in the middle, or an address that is none, is no reason to stop.
  answer(request, response).catch(() => response.destroy());
});
server.listen(Number(options.port), "127.0.0.1", () => console.log(`http://localhost:${server.address().port}/`));
