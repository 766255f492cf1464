"""What clients run: the demo's bundles, and environments of their own, made under `build/clients` and kept there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_export.build import BuildRequest, build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEPT = ROOT / "build" / "clients"
DEMO = ROOT / "examples" / "demo"
TASKS = ("describe", "headline", "json")
PROMPTS = tuple((DEMO / "prompts.txt").read_text(encoding="utf-8").splitlines()[:3])
NEW_TOKENS = 120


def run(command, **options):
    """The standard output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command[0]}: {done.stderr[-3000:]}"
    return done.stdout


def python_of(name):
    """The interpreter of an environment with what `requirements/NAME.txt` lists."""
    wanted = (HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    home = KEPT / name
    python, stamp = home / "bin" / "python", home / ".installed"
    with one_at_a_time(home):
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
            run([sys.executable, "-m", "venv", "--clear", home])
            run([python, "-m", "pip", "install", "--quiet", "--requirement", HERE / "requirements" / f"{name}.txt"])
            stamp.write_text(wanted, encoding="utf-8")
    return python


@contextmanager
def one_at_a_time(home):
    """Let one of the tests' processes install into a folder, while the others wait."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_name(f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def program(*names, install):
    """The path of the first of some programs that is there."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail(f"{names[0]}: expected the program, found none; install {install}")
    return found


def node():
    """Node.js."""
    return program("node", install="Node.js 20 or later")


def chromium():
    """Chromium, or what the environment variable CHROMIUM names."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CHROMIUM") or program(*names, install="Chromium (Debian: apt-get install chromium)")


def install_packages(folder):
    """Have a folder's `node_modules` hold what its `package-lock.json` lists.

    npm's own record of what it installed leaves out other systems' packages, so that it never equals the list; and to
    install once more would take the folder away under a test of the other process.
    """
    wanted = (folder / "package-lock.json").read_text(encoding="utf-8")
    stamp = folder / "node_modules" / ".installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        npm = program("npm", install="npm, which comes with Node.js")
        run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, timeout=600)
        stamp.write_text(wanted, encoding="utf-8")


def node_packages():
    """The folder whose `node_modules` holds what `package-lock.json` lists."""
    home = KEPT / "node"
    with one_at_a_time(home):
        home.mkdir(exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, home)
        install_packages(home)
    return home


def ask(python, script, *arguments):
    """What a client's script prints as JSON; it may use no network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return json.loads(run([python, HERE / script, *arguments], env=os.environ | offline).splitlines()[-1])


@dataclass(frozen=True)
class Source:
    """What bundles are made of: a model, and the prefixes that PEFT trained for it, by task."""

    model: Path
    prefixes: dict[str, Path]


TRAINED = Source(DEMO / "model", {task: DEMO / "prefixes" / task for task in TASKS})


@pytest.fixture(scope="session")
def grouped(workshop):
    """A Llama with grouped queries and rotary positions, its weights and its prefix random."""
    model = workshop.model("llama", tokenizer=True)
    return Source(model, {"p20": workshop.adapter(model, 20)})


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory):
    """Makes bundles of a source and some of its tasks, each once."""
    made = {}

    def make(*tasks, source=TRAINED, **options):
        key = (source.model, tasks, tuple(sorted(options.items())))
        if key not in made:
            prefixes = {task: source.prefixes[task] for task in tasks}
            output = tmp_path_factory.mktemp("bundles") / "bundle"
            made[key] = build(BuildRequest(str(source.model), prefixes, output, **options)).bundle.root
        return made[key]

    return make


@pytest.fixture(scope="session")
def peft_answers():
    """PEFT's own new token ids for prompts under a task, padded on the left where they are together."""

    def answer(task, prompts=PROMPTS, source=TRAINED, **options):
        tokenizer = AutoTokenizer.from_pretrained(source.model, padding_side="left")
        tokenizer.pad_token = tokenizer.eos_token
        base = AutoModelForCausalLM.from_pretrained(source.model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, source.prefixes[task]).eval()
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **options)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    return answer
