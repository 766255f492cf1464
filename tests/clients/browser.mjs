/**
 * A browser that another program drives: `node browser.mjs PACKAGE_JSON CHROMIUM`, where the package has playwright-core.
 *
 * Reads a command a line, as JSON, `{"action": ..., ...}`, and writes, for each, what the page shows then.
 */

import { createInterface } from "node:readline";

import { launch } from "./chromium.mjs";

const browser = await launch(...process.argv.slice(2));
let page;
let notes;

const text = (selector) => page.locator(selector).textContent();

async function settled() {
  await page.waitForFunction(() => {
    const isIdle = document.getElementById("stop").disabled && document.getElementById("fetched").textContent !== "…";
    const isOpen = !document.getElementById("run").disabled && document.getElementById("offline").textContent;
    return document.getElementById("problem").textContent ? isIdle : isIdle && isOpen;
  });
}

const actions = {
  /** A page of a browser that has kept nothing. */
  async open({ url }) {
    await page?.context().close();
    const context = await browser.newContext({ viewport: { width: 800, height: 720 }, colorScheme: "light" });
    page = await context.newPage();
    notes = { errors: [], foreign: [] };
    page.on("pageerror", (error) => notes.errors.push(String(error)));
    context.on("request", (request) => {
      if (new URL(request.url()).origin !== new URL(url).origin) notes.foreign.push(request.url());
    });
    await page.goto(url);
  },

  async reload() {
    await page.reload();
  },

  async choose({ task }) {
    await page.getByText(task, { exact: true }).click();
  },

  async run({ task, prompt }) {
    await page.getByText(task, { exact: true }).click();
    await page.getByLabel("Prompt").fill(prompt);
    await page.getByRole("button", { name: "Run" }).click();
  },

  /** Run, and note every text that the answer is on its way. */
  async watch({ task, prompt }) {
    await page.getByText(task, { exact: true }).click();
    await page.getByLabel("Prompt").fill(prompt);
    await page.evaluate(() => {
      const answer = document.getElementById("answer");
      window.seen = [];
      new MutationObserver(() => window.seen.push(answer.textContent)).observe(answer, { childList: true });
      document.getElementById("run").click();
    });
  },

  /** Run, and press "Stop" when the first text appears. */
  async runAndStop({ task, prompt }) {
    await page.getByText(task, { exact: true }).click();
    await page.getByLabel("Prompt").fill(prompt);
    await page.evaluate(() => {
      const answer = document.getElementById("answer");
      const observer = new MutationObserver(() => {
        if (!answer.textContent) return;
        observer.disconnect();
        document.getElementById("stop").click();
      });
      observer.observe(answer, { childList: true });
      document.getElementById("run").click();
    });
  },

  /** Run, and press "Stop" at once. */
  async stopAtOnce({ task, prompt }) {
    await page.getByText(task, { exact: true }).click();
    await page.getByLabel("Prompt").fill(prompt);
    await page.evaluate(() => ["run", "stop"].forEach((id) => document.getElementById(id).click()));
  },

  async screenshot({ path }) {
    await page.screenshot({ path, fullPage: true });
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { action, ...options } = JSON.parse(line);
  await actions[action](options);
  await settled();
  const shown = {};
  for (const id of ["about", "answer", "problem", "fetched", "first", "each", "reason", "offline"]) {
    shown[id] = await text(`#${id}`);
  }
  shown.tasks = await page.locator("#tasks label").allTextContents();
  shown.seen = await page.evaluate(() => window.seen ?? []);
  console.log(JSON.stringify({ ...shown, ...notes }));
}
await browser.close();
