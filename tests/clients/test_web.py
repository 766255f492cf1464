"""`examples/web` in a real browser: its text is PEFT's, a prefix is fetched once, and it works without a server."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefix_runtime
from prefix_export.build import BuildRequest, build
from prefix_runtime import LayerPrefix, Prefix
from tests.clients.conftest import DEMO, HERE, ROOT, TASKS, chromium, install_packages, node

pytestmark = pytest.mark.clients

WEB = ROOT / "examples" / "web"
NO_PREFIX = "no prefix"
PROMPTS = (DEMO / "prompts.txt").read_text(encoding="utf-8").splitlines()
SECONDS = 120  # after which a browser or server that says nothing is given up


class Lines:
    """The lines that a process writes, read as they come."""

    def __init__(self, process):
        self.all = []
        self._new = queue.Queue()
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()

    def _read(self, stream):
        for line in stream:
            self.all.append(line.rstrip("\n"))
            self._new.put(self.all[-1])
        self._new.put(None)

    def next(self):
        line = self._new.get(timeout=SECONDS)
        assert line is not None, "the process has ended"
        return line


@contextmanager
def running(*command, ends_with_its_input=False):
    """A process whose standard input and output are ours; it is ended behind."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with subprocess.Popen(list(map(str, command)), **streams) as process:
        try:
            yield process
        finally:
            process.stdin.close()
            if not ends_with_its_input:
                process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


class Server:
    """`serve.mjs` on a bundle: its address, and the answers that it gave."""

    def __init__(self, process):
        self._process, self._lines = process, Lines(process)
        self.url = self._lines.next()

    def count(self, path):
        """Times that a file was sent."""
        return self._lines.all.count(f"200 {path}")

    def stop(self):
        self._process.terminate()
        self._process.wait(timeout=SECONDS)


class Browser:
    """The page in Chromium; each method returns what it shows then, by the element's id."""

    def __init__(self, process):
        self._process, self._lines = process, Lines(process)

    def __getattr__(self, action):
        return lambda **options: self._do({"action": action, **options})

    def _do(self, command):
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        shown = json.loads(self._lines.next())
        assert shown["errors"] == []
        assert shown["foreign"] == [], "the page asks another host"
        return shown


@pytest.fixture(scope="module", autouse=True)
def _packages():
    """What the example needs, as it is locked."""
    install_packages(WEB)


@pytest.fixture(scope="module")
def browser():
    command = (node(), HERE / "browser.mjs", WEB / "package.json", chromium())
    with running(*command, ends_with_its_input=True) as process:
        yield Browser(process)


@pytest.fixture
def serve():
    """Start `serve.mjs` on a bundle."""
    with ExitStack() as servers:
        yield lambda bundle: Server(
            servers.enter_context(running(node(), WEB / "serve.mjs", "--port", 0, "--bundle", bundle))
        )


@pytest.fixture(scope="module")
def make_bundle(tmp_path_factory):
    """Build a bundle of the demo; its certificate is of no interest here."""

    def make(**options):
        prefixes = {task: DEMO / "prefixes" / task for task in TASKS}
        folder = tmp_path_factory.mktemp("web") / "bundle"
        return build(BuildRequest(str(DEMO / "model"), prefixes, folder, verify=False, **options)).bundle.root

    return make


@pytest.fixture(scope="module")
def shared_bundle(make_bundle):
    """What the page runs; not to be changed."""
    return make_bundle(target="web", mode="feed")


@pytest.fixture
def bundle(shared_bundle, tmp_path):
    """A copy of it, to be changed and broken."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


def add_task(bundle, name, content, like):
    """Add a file as a task, whatever it holds, listed as if it were of the length of another."""
    path = bundle / "prefixes" / f"{name}.safetensors"
    path.write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    entry = {"path": f"prefixes/{path.name}", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["tasks"][name] = {**manifest["tasks"][like], "file": entry}
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture(scope="module")
def peft_text():
    """PEFT's own greedy answer, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    models = {}

    def answer(prompt, task):
        if task not in models:
            model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype="float32").eval()
            models[task] = PeftModel.from_pretrained(model, DEMO / "prefixes" / task) if task else model
        encoded = tokenizer(prompt, return_tensors="pt")
        ids = models[task].generate(**encoded, do_sample=False, max_new_tokens=128)[0, encoded["input_ids"].shape[1] :]
        return tokenizer.decode(ids, skip_special_tokens=True)

    return answer


@pytest.mark.parametrize("task", [*TASKS, None])
def test_the_page_writes_what_the_runtime_and_peft_write(browser, serve, shared_bundle, peft_text, task):
    engine = prefix_runtime.load(shared_bundle, threads=1)
    shown = browser.open(url=serve(shared_bundle).url)
    assert shown["tasks"] == [NO_PREFIX, *TASKS]
    for prompt in PROMPTS:
        shown = browser.run(task=task or NO_PREFIX, prompt=prompt)
        assert shown["problem"] == ""
        assert shown["reason"] == "end token"
        assert shown["answer"] == engine.generate(prompt, task=task).text
        assert shown["answer"] == peft_text(prompt, task)


def test_what_it_took_is_shown(browser, serve, shared_bundle):
    browser.open(url=serve(shared_bundle).url)
    shown = browser.run(task="describe", prompt=PROMPTS[0])
    assert re.fullmatch(r"[\d.,]+ ms \(16 positions, 99 kB\)", shown["fetched"])
    assert re.fullmatch(r"[\d.,]+ ms", shown["first"])
    tokens = len(prefix_runtime.load(shared_bundle, threads=1).generate(PROMPTS[0], task="describe").token_ids)
    assert re.fullmatch(rf"[\d.,]+ ms \({tokens} tokens\)", shown["each"])
    assert not re.search(r"\d", browser.run(task=NO_PREFIX, prompt=PROMPTS[0])["fetched"])


def test_text_is_shown_as_it_comes(browser, serve, shared_bundle):
    browser.open(url=serve(shared_bundle).url)
    shown = browser.watch(task="describe", prompt=PROMPTS[0])
    growing = list(filter(None, shown["seen"]))
    assert growing[-1] == shown["answer"]
    assert len(set(growing)) > 10, "a text that comes at once proves nothing"
    assert all(later.startswith(before) for before, later in itertools.pairwise(growing))


def test_a_prefix_is_fetched_when_it_is_chosen_and_once(browser, serve, shared_bundle):
    server = serve(shared_bundle)
    paths = {task: f"/bundle/prefixes/{task}.safetensors" for task in TASKS}
    browser.open(url=server.url)
    assert [server.count(path) for path in paths.values()] == [0, 0, 0]
    browser.choose(task="json")
    assert server.count(paths["json"]) == 1
    for task in ("json", "headline", "json"):
        browser.run(task=task, prompt=PROMPTS[0])
    browser.reload()
    shown = browser.run(task="json", prompt=PROMPTS[0])
    assert shown["fetched"].startswith("kept by the browser")
    assert [server.count(paths[task]) for task in ("json", "headline", "describe")] == [1, 1, 0]
    assert server.count("/bundle/onnx/model_quantized.onnx") == 1


def test_without_a_server_the_page_answers_under_the_tasks_that_were_fetched(browser, serve, shared_bundle):
    server = serve(shared_bundle)
    browser.open(url=server.url)
    with_server = [browser.run(task=task, prompt=PROMPTS[1])["answer"] for task in ("json", NO_PREFIX)]
    server.stop()
    browser.reload()
    assert [browser.run(task=task, prompt=PROMPTS[1])["answer"] for task in ("json", NO_PREFIX)] == with_server
    shown = browser.run(task="headline", prompt=PROMPTS[1])
    assert shown["problem"].startswith(
        "prefixes/headline.safetensors: expected it from the server, found no connection"
    )
    assert shown["answer"] == ""
    assert browser.run(task="json", prompt=PROMPTS[1])["answer"] == with_server[0]


def test_a_bundle_that_was_built_anew_replaces_what_was_kept(browser, serve, bundle):
    server = serve(bundle)
    browser.open(url=server.url)
    headline = browser.run(task="headline", prompt=PROMPTS[0])["answer"]
    add_task(bundle, "json", (bundle / "prefixes" / "headline.safetensors").read_bytes(), "headline")
    browser.reload()
    assert browser.run(task="json", prompt=PROMPTS[0])["answer"] == headline


def test_a_prefix_in_float16_answers_as_in_the_runtime(browser, serve, bundle):
    folded = Prefix.load(bundle / "prefixes" / "describe.safetensors")
    layers = [
        LayerPrefix(*(part.astype(np.float16) for part in (layer.key, layer.value)))
        for layer in folded.sites["decoder"]
    ]
    half = bundle.parent / "half.safetensors"
    Prefix({"decoder": tuple(layers)}, folded.position_base, folded.base_fingerprint).save(half)
    add_task(bundle, "half", half.read_bytes(), "describe")
    browser.open(url=serve(bundle).url)
    engine = prefix_runtime.load(bundle, threads=1)
    for prompt in PROMPTS:
        assert browser.run(task="half", prompt=prompt)["answer"] == engine.generate(prompt, task="half").text


def test_stop_ends_an_answer(browser, serve, shared_bundle):
    browser.open(url=serve(shared_bundle).url)
    whole = browser.run(task="json", prompt=PROMPTS[0])["answer"]
    stopped = browser.runAndStop(task="json", prompt=PROMPTS[0])
    assert stopped["reason"] == "stopped"
    assert stopped["answer"]
    assert whole.startswith(stopped["answer"])
    assert len(stopped["answer"]) < len(whole)
    stopped = browser.stopAtOnce(task="json", prompt=PROMPTS[0])
    assert (stopped["reason"], stopped["answer"]) == ("stopped", "")
    assert browser.run(task="json", prompt=PROMPTS[0])["answer"] == whole


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"target": "cpu"}, "manifest.json: flavour: expected portable, found fast; "),
        ({"target": "web", "mode": "bake"}, "manifest.json: mode: expected feed, found bake; "),
        ({"target": "portable"}, "manifest.json: target: expected web, found portable; "),
    ],
    ids=["fast", "bake", "weights apart"],
)
def test_a_bundle_of_another_kind_gives_its_line(browser, serve, make_bundle, options, line):
    shown = browser.open(url=serve(make_bundle(**options)).url)
    assert shown["problem"] == f"{line}build it with --target web --mode feed --precision int8"
    assert shown["tasks"] == [NO_PREFIX]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("manifest.json", "manifest.json: expected a file, found HTTP 404; build a bundle first, see README.md"),
        ("tokenizer.json", "tokenizer.json: expected a file, found HTTP 404; copy the whole bundle to the server"),
        (
            "onnx/model_quantized.onnx",
            "onnx/model_quantized.onnx: expected a file, found HTTP 404; copy the whole bundle to the server",
        ),
    ],
)
def test_a_missing_file_gives_its_line(browser, serve, bundle, path, line):
    (bundle / path).unlink()
    assert browser.open(url=serve(bundle).url)["problem"] == line


def test_damaged_files_give_their_lines(browser, serve, bundle):
    shorter, flipped = (bundle / "prefixes" / f"{task}.safetensors" for task in ("json", "describe"))
    shorter.write_bytes(shorter.read_bytes()[:-1])
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x55")
    browser.open(url=serve(bundle).url)
    lines = {task: browser.choose(task=task)["problem"] for task in TASKS}
    assert lines["json"] == "prefixes/json.safetensors: expected 50136 bytes, found 50135; copy the bundle again"
    assert re.fullmatch(
        r"prefixes/describe\.safetensors: expected SHA-256 \w{12}…, found \w{12}…; copy the bundle again",
        lines["describe"],
    )
    assert lines["headline"] == ""


def broken_prefixes(path):
    """Files that are not prefixes of this model, by name, with what the page says of each."""
    whole, tensors = path.read_bytes(), load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()

    def written(name, tensor=None, **changes):
        changed = {key: value for key, value in {**tensors, name: tensor}.items() if value is not None}
        return save(changed, {**metadata, **changes})

    key = tensors["decoder.1.key"]
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def packed(data=data, **changes):
        text = json.dumps({**header, **changes}).encode()
        return len(text).to_bytes(8, "little") + text + data

    first = header["decoder.1.key"]
    not_finite = key.copy()
    not_finite[0, 0, 0] = np.nan
    return {
        "empty": (b"", "expected a safetensors file, found 0 bytes"),
        "huge": (b"\xff" * 64, "expected a safetensors file, found a header of"),
        "no_json": ((2).to_bytes(8, "little") + b"{]", "expected a JSON object as its header, found none"),
        "more": (whole + b"\0", f"expected {len(data)} bytes of tensors, found {len(data) + 1}"),
        "less": (packed(data[:-4]), f"expected {len(data)} bytes of tensors, found {len(data) - 4}"),
        "overlap": (packed(**{"decoder.1.key": header["decoder.0.key"]}), "expected its numbers at byte"),
        "outside": (
            packed(**{"decoder.1.key": {**first, "data_offsets": [-4, first["data_offsets"][1]]}}),
            "decoder.1.key: expected a shape and two offsets",
        ),
        "size": (packed(**{"decoder.1.key": {**first, "shape": [6, 8, 31]}}), "for shape [6,8,31], found 6144"),
        "dtype": (
            packed(**{"decoder.1.key": {**first, "dtype": "I32"}}),
            "decoder.1.key: expected F32 or F16, found I32",
        ),
        "other_shape": (
            written("decoder.1.key", np.ascontiguousarray(key[:, :, :16])),
            "decoder.1.key: expected shape [6, 8, 32], found [6, 8, 16]",
        ),
        "layer_less": (written("decoder.3.value"), "decoder.3.value: expected shape [6, 8, 32], found none"),
        "layer_more": (written("decoder.4.key", key), "expected 8 tensors, found 9"),
        "nan": (written("decoder.1.key", not_finite), "decoder.1.key: expected finite numbers"),
        "no_prefix_file": (
            written("decoder.1.key", key, format="pt"),
            "format: expected prefix-export.prefix, found pt",
        ),
        "newer": (written("decoder.1.key", key, format_version="2"), "format_version: expected 1, found 2"),
        "base": (written("decoder.1.key", key, position_base="0"), "position_base: expected 8, found 0"),
        "model": (
            written("decoder.1.key", key, base_fingerprint="sha256:0"),
            "base_fingerprint: expected sha256:31e0f7",
        ),
    }


def test_files_that_are_no_prefixes_of_the_model_give_their_lines(browser, serve, bundle):
    broken = broken_prefixes(bundle / "prefixes" / "json.safetensors")
    for name, (content, _) in broken.items():
        add_task(bundle, name, content, "json")
    browser.open(url=serve(bundle).url)
    for name, (_, line) in broken.items():
        shown = browser.choose(task=name)["problem"]
        assert shown.startswith(f"prefixes/{name}.safetensors: ")
        assert line in shown
    # None of them is in the way of those that are whole.
    assert browser.run(task="headline", prompt=PROMPTS[0])["answer"].startswith("Climb Sprat Table")


def test_a_prompt_that_is_too_long_or_empty_gives_its_line(browser, serve, shared_bundle):
    browser.open(url=serve(shared_bundle).url)
    long = PROMPTS[0] * 4
    tokens = len(AutoTokenizer.from_pretrained(DEMO / "model")(long)["input_ids"])
    assert browser.run(task="json", prompt=long)["problem"] == (
        "prompt: expected at most 247 tokens, as the context holds 256 and the prefix takes 8, "
        f"found {tokens}; shorten it"
    )
    assert browser.run(task="json", prompt="")["problem"] == "prompt: expected text, found none"
    assert browser.run(task="json", prompt=PROMPTS[0])["problem"] == ""


def test_the_server_serves_its_folder_alone(serve, shared_bundle):
    url = serve(shared_bundle).url.rstrip("/")
    outside = "pyproject.toml"
    assert (ROOT / outside).exists()
    for up in ("/../../", "/%2e%2e/%2e%2e/", "/..%2f..%2f", "/bundle/..%2f..%2f", "/%00"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + up + outside)


def test_a_screenshot(browser, serve, shared_bundle, tmp_path):
    """As it stands in the README: WEB_SCREENSHOT=examples/web/screenshot.png writes that one anew."""
    path = Path(os.environ.get("WEB_SCREENSHOT", tmp_path / "screenshot.png")).absolute()
    browser.open(url=serve(shared_bundle).url)
    browser.run(task="json", prompt=PROMPTS[0])
    browser.screenshot(path=str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000


def test_what_is_installed_is_locked_and_names_no_host():
    lock = (WEB / "package-lock.json").read_text(encoding="utf-8")
    assert "://" not in lock
    locked = json.loads(lock)["packages"]
    package = json.loads((WEB / "package.json").read_text(encoding="utf-8"))
    asked = {**package["dependencies"], **package["devDependencies"]}
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in asked.values())
    assert asked == {name: locked[f"node_modules/{name}"]["version"] for name in asked}
