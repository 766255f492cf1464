/** The engine in a thread of its own, so that the page stays responsive while the model computes. */

import { Engine } from "./engine.js";
import { PageError } from "./errors.js";

const opening = Engine.open(new URL("bundle/", self.location));
opening.catch(() => {}); // told to whoever asks, who may not have asked yet
const channel = new MessageChannel();
let isStopped = false;

const actions = {
  async open() {
    const { model, precision, files, graph, tasks } = (await opening).manifest;
    const { size } = files.find((entry) => entry.path === graph);
    return { model: model.name, architecture: model.architecture, precision, size, tasks: Object.keys(tasks) };
  },

  async fetch({ task }) {
    const { size, length, milliseconds, isKept } = await (await opening).prefix(task);
    return { size, length, milliseconds, isKept };
  },

  async generate({ id, prompt, task }) {
    isStopped = false;
    const milliseconds = [];
    let reason = "stopped";
    for await (const token of (await opening).generate(prompt, task)) {
      milliseconds.push(token.milliseconds);
      self.postMessage({ id, piece: token.text });
      if (token.reason) reason = token.reason;
      await otherMessages();
      if (isStopped) break;
    }
    return { reason, milliseconds };
  },

  stop() {
    isStopped = true;
  },
};

self.onmessage = async ({ data }) => {
  const { id, action, ...options } = data;
  try {
    self.postMessage({ id, result: await actions[action]({ id, ...options }) });
  } catch (error) {
    self.postMessage({ id, error: error instanceof PageError ? error.message : `${error}` });
  }
};

/** Let messages that came in the meantime, such as "stop", be taken; timers would wait 4 ms each. */
function otherMessages() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}
