import { createRequire } from "node:module";

// A fresh profile otherwise asks for components and settings from outside.
const ARGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

/** A headless Chromium, driven by the playwright-core that lies beside a package.json. */
export function launch(packageFile, executablePath) {
  const { chromium } = createRequire(packageFile)("playwright-core");
  return chromium.launch({ executablePath, args: ARGS });
}
