/** The page: a task is chosen, a prompt is run, the text and what it took are shown. */

const part = (id) => document.getElementById(id);
const form = part("form");
const calls = new Map();
let worker;
let lastId = 0;
let isStopped = false;

/** Ask the worker for something; pieces of text come one by one, the result or a line that says what is wrong last. */
function call(action, options = {}, onPiece = undefined) {
  const id = ++lastId;
  return new Promise((resolve, reject) => {
    calls.set(id, { resolve, reject, onPiece });
    worker.postMessage({ id, action, ...options });
  });
}

function onMessage({ data: { id, piece, result, error } }) {
  const { resolve, reject, onPiece } = calls.get(id);
  if (piece !== undefined) {
    onPiece(piece);
    return;
  }
  calls.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
}

function showProblem(line) {
  part("problem").textContent = line;
}

function milliseconds(value) {
  return `${value.toLocaleString("en", { maximumSignificantDigits: 3 })} ms`;
}

function bytes(size) {
  return size < 1e6 ? `${Math.round(size / 1e3)} kB` : `${(size / 1e6).toFixed(1)} MB`;
}

function median(values) {
  const sorted = values.toSorted((left, right) => left - right);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** The chosen task's name, or null for none. */
function chosenTask() {
  return form.elements.task.value || null;
}

/** Fetch a task's prefix, unless it is there, and show what that took. */
async function fetchPrefix(task) {
  if (task === null) {
    part("fetched").textContent = "–";
    return;
  }
  const { size, length, milliseconds: spent, isKept } = await call("fetch", { task });
  // Another may have been chosen in the meantime.
  if (task !== chosenTask()) return;
  const from = isKept ? "kept by the browser, read in " : "";
  part("fetched").textContent = `${from}${milliseconds(spent)} (${length} positions, ${bytes(size)})`;
}

async function choose() {
  const task = chosenTask();
  showProblem("");
  part("fetched").textContent = "…";
  try {
    await fetchPrefix(task);
  } catch (error) {
    if (task !== chosenTask()) return;
    part("fetched").textContent = "–";
    showProblem(error.message);
  }
}

async function run(event) {
  event.preventDefault();
  showProblem("");
  const answer = part("answer");
  answer.textContent = "";
  for (const id of ["first", "each", "reason"]) part(id).textContent = "–";
  isStopped = false;
  setRunning(true);
  try {
    const task = chosenTask();
    await fetchPrefix(task);
    if (isStopped) part("reason").textContent = "stopped";
    else showFigures(await call("generate", { task, prompt: part("prompt").value }, (piece) => answer.append(piece)));
  } catch (error) {
    showProblem(error.message);
  }
  setRunning(false);
}

function stop() {
  isStopped = true;
  call("stop");
}

function showFigures({ reason, milliseconds: [first, ...others] }) {
  part("first").textContent = milliseconds(first);
  if (others.length) part("each").textContent = `${milliseconds(median(others))} (${others.length + 1} tokens)`;
  part("reason").textContent = reason;
}

function setRunning(isRunning) {
  part("answer").setAttribute("aria-busy", isRunning);
  part("tasks").disabled = isRunning;
  part("run").disabled = isRunning;
  part("stop").disabled = !isRunning;
}

function addTask(name) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "task", value: name });
  const text = Object.assign(document.createElement("span"), { textContent: name });
  label.append(input, text);
  part("tasks").append(label);
}

/** Keep the page for times without a connection; without this, as in some private windows, it works all the same. */
async function keepOffline() {
  try {
    await navigator.serviceWorker.register("service_worker.js");
    await navigator.serviceWorker.ready;
    part("offline").textContent = "Works without a connection now, under every task that was fetched once.";
  } catch (error) {
    part("offline").textContent = `Does not work without a connection: ${error.message}`;
  }
}

async function open() {
  if (!isSecureContext) {
    throw new Error("page: expected https or localhost, where browsers allow what it needs, found neither");
  }
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = onMessage;
  worker.onerror = ({ message }) => {
    const found = message ?? "a file missing";
    const error = new Error(`worker.js: expected it to start, found ${found}; run npm ci --ignore-scripts`);
    for (const { reject } of calls.values()) reject(error);
  };
  const { model, architecture, precision, size, tasks } = await call("open");
  part("about").textContent = `${model}: ${architecture}, ${precision}, ${bytes(size)}, computed in this browser`;
  tasks.forEach(addTask);
  form.addEventListener("submit", run);
  part("tasks").addEventListener("change", choose);
  part("stop").addEventListener("click", stop);
  setRunning(false);
  await keepOffline();
}

open().catch((error) => {
  part("about").textContent = "The model could not be loaded.";
  showProblem(error.message);
});
