/** Keeps the page, its modules and onnxruntime for times without a connection; the bundle's files `bundle.js` keeps. */

const CACHE = "prefix-export-page";
const FILES = [
  "./",
  "style.css",
  "page.js",
  "worker.js",
  "engine.js",
  "bundle.js",
  "errors.js",
  "prefix.js",
  "safetensors.js",
  "text.js",
  "node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs",
  "node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
  "node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
  "bundle/manifest.json",
];
const KEPT = new Set(FILES.map((path) => new URL(path, self.registration.scope).href));

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES)));
});

self.addEventListener("fetch", (event) => {
  if (KEPT.has(event.request.url)) event.respondWith(newest(event.request));
});

/** What the server has, which is kept, or what was kept before. */
async function newest(request) {
  const cache = await caches.open(CACHE);
  let response;
  try {
    response = await fetch(request);
  } catch {
    return (await cache.match(request.url)) ?? Response.error();
  }
  if (response.ok) await cache.put(request.url, response.clone());
  return response;
}
