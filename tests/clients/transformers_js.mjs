// transformers.js in Chromium, unmodified: serves a bundle and the library on localhost, runs a page, prints its answers.
//
//     node transformers_js.mjs FOLDER_WITH_node_modules CHROMIUM BUNDLE DTYPE < prompts, a JSON list
//
// Prints a JSON list: for each prompt the new token ids and the text, greedily.
import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import path from "node:path";
import { text } from "node:stream/consumers";

import { launch } from "./chromium.mjs";

const [packages, executablePath, bundle, dtype] = process.argv.slice(2);

const TYPES = {
  ".html": "text/html",
  ".js": "text/javascript",
  ".json": "application/json",
  ".mjs": "text/javascript",
  ".wasm": "application/wasm",
};
const PAGE = `<!DOCTYPE html><script type="module">
  import { AutoModelForCausalLM, AutoTokenizer, env } from "/packages/@huggingface/transformers/dist/transformers.min.js";
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = "/models/";
  env.backends.onnx.wasm.wasmPaths = "/packages/onnxruntime-web/dist/";
  window.answer = async (prompts, dtype) => {
    const tokenizer = await AutoTokenizer.from_pretrained("bundle");
    const model = await AutoModelForCausalLM.from_pretrained("bundle", { dtype, device: "wasm" });
    const answers = [];
    for (const prompt of prompts) {
      const inputs = tokenizer(prompt);
      const output = await model.generate({ ...inputs, max_new_tokens: 120, do_sample: false });
      const ids = output.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number);
      answers.push({ ids, text: tokenizer.decode(ids, { skip_special_tokens: true }) });
    }
    return answers;
  };
  window.isReady = true;
</script>`;

/** The file behind an address, or null. */
function fileOf(address) {
  const [, root, ...rest] = new URL(address, "http://localhost").pathname.split("/");
  if (root === "models" && rest.shift() === "bundle") return path.join(bundle, ...rest);
  return root === "packages" ? path.join(packages, "node_modules", ...rest) : null;
}

const server = createServer((request, response) => {
  if (request.url === "/") return response.setHeader("content-type", "text/html").end(PAGE);
  const file = fileOf(request.url);
  if (!file || !existsSync(file) || !statSync(file).isFile()) return response.writeHead(404).end();
  response.writeHead(200, {
    "content-type": TYPES[path.extname(file)] ?? "application/octet-stream",
    "content-length": statSync(file).size,
  });
  createReadStream(file).pipe(response);
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));

const browser = await launch(path.join(path.resolve(packages), "package.json"), executablePath);
try {
  const page = await browser.newPage();
  page.on("pageerror", (error) => console.error(error.message));
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  await page.waitForFunction(() => window.isReady, null, { timeout: 60_000 });
  const prompts = JSON.parse(await text(process.stdin));
  const answers = await page.evaluate(([prompts, dtype]) => window.answer(prompts, dtype), [prompts, dtype]);
  console.log(JSON.stringify(answers));
} finally {
  await browser.close();
  server.close();
}
