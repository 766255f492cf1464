"""What several tests of the exporter start from."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from prefix_export import formats
from prefix_export.models import load_base_model


def read_prefix(path, shape):
    """The one prefix of a checkpoint."""
    (prefix,) = formats.read(path, shape).parts.values()
    return prefix


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)

    def set(self, at: Path) -> None:
        at.write_bytes(pickle.dumps({"prompt_embeddings": self}, protocol=2))  # as torch writes

    @property
    def sprung(self) -> bool:
        return self.path.exists()


@pytest.fixture
def trap(tmp_path) -> Trap:
    trap = Trap(tmp_path / "sprung")
    pickle.loads(pickle.dumps(trap))
    assert trap.sprung, "the trap would show nothing"
    trap.path.unlink()
    return trap


@pytest.fixture(scope="session")
def gpt2(workshop) -> Path:
    """A GPT-2 folder: 3 layers, 4 heads of 16, context 320."""
    return workshop.model("gpt2")


@pytest.fixture(scope="session")
def base(gpt2):
    return load_base_model(str(gpt2))


@pytest.fixture(scope="session")
def gpt2_adapter(workshop, gpt2) -> Path:
    """An adapter for it, prefix length 3; not to be changed."""
    return workshop.adapter(gpt2, 3)


@pytest.fixture
def adapter(gpt2_adapter, tmp_path) -> Path:
    """A copy of it, to be changed and broken."""
    return Path(shutil.copytree(gpt2_adapter, tmp_path / "adapter"))


@pytest.fixture
def edit():
    """Change an adapter folder in place: values of its config, None to leave one out; its tensors, by a function."""

    def edit(folder: Path, tensors=None, **config) -> Path:
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text()) | config
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        if tensors is not None:
            weights = folder / "adapter_model.safetensors"
            save_file(tensors(load_file(weights)["prompt_embeddings"]), weights)
        return folder

    return edit


class RecordedProgress:
    """A progress that keeps what it is told: the phases in order, and how many steps of each total were done."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.totals: dict[str, int | None] = {}
        self.steps: dict[str, float] = {}

    def phase(self, name, total=None, **_):
        self.phases.append(name)
        self.totals[name] = None if total is None else (self.totals.get(name) or 0) + total
        self.steps.setdefault(name, 0)

    def advance(self, steps=1):
        self.steps[self.phases[-1]] += steps
