"""What clients run: the demo's bundles, and environments of their own, made under `build/clients` and kept there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        run([sys.executable, "-m", "venv", "--clear", home])
        run([python, "-m", "pip", "install", "--quiet", "--requirement", HERE / "requirements" / f"{name}.txt"])
        stamp.write_text(wanted, encoding="utf-8")
    return python


def node_packages():
    """The folder whose `node_modules` holds what `package-lock.json` lists."""
    for program in ("node", "npm"):
        assert shutil.which(program), f"{program} is not installed; these tests need Node.js 20 or later"
    home = KEPT / "node"
    lock = (HERE / "package-lock.json").read_bytes()
    stamp = home / ".installed"
    if not stamp.exists() or stamp.read_bytes() != lock:
        home.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, home)
        run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=home)
        stamp.write_bytes(lock)
    return home


def ask(python, script, *arguments):
    """What a client's script prints as JSON; it may use no network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return json.loads(run([python, HERE / script, *arguments], env=os.environ | offline).splitlines()[-1])


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory):
    """Makes bundles of the demo's model and some of its tasks, each once."""
    made = {}

    def make(*tasks, **options):
        key = (tasks, tuple(sorted(options.items())))
        if key not in made:
            prefixes = {task: DEMO / "prefixes" / task for task in tasks}
            output = tmp_path_factory.mktemp("bundles") / "bundle"
            made[key] = build(BuildRequest(str(DEMO / "model"), prefixes, output, **options)).bundle.root
        return made[key]

    return make


@pytest.fixture(scope="session")
def peft_answers():
    """PEFT's own new token ids for prompts under a task, padded on the left where they are together."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token

    def answer(task, prompts=PROMPTS, **options):
        base = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, DEMO / "prefixes" / task).eval()
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **options)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    return answer
