"""SmolLM2-135M, its trained prefixes and the scripts of `examples/real`."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

REAL = Path(__file__).parents[2] / "examples" / "real"
SCRIPTS = ("fetch", "contestants", "evaluate", "corpus", "scoring")


@pytest.fixture(scope="session")
def scripts():
    """The modules of `examples/real` and of the demo that they use, by name."""
    sys.path.insert(0, str(REAL))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})


@pytest.fixture(scope="session")
def subject(scripts):
    """The fetched model and the committed prefixes; one thread, because two tests run at a time."""
    tasks = tuple(scripts.corpus.TASKS)
    return scripts.contestants.Subject(scripts.fetch.fetch(), REAL / "prefixes", tasks, threads=1)


@pytest.fixture(scope="session")
def committed_texts(subject):
    """PEFT's texts by task, as committed for exactly these adapters."""
    committed = json.loads((REAL / "peft_texts.json").read_text(encoding="utf-8"))
    weights = {task: folder / "adapter_model.safetensors" for task, folder in subject.adapters().items()}
    assert committed["adapters"] == {t: hashlib.sha256(path.read_bytes()).hexdigest() for t, path in weights.items()}
    return committed["texts"]
