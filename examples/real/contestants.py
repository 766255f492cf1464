"""What is evaluated: PEFT, and the runtime on a bundle of each precision. Each writes texts for held-out tables."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefix_runtime
from prefix_export.build import BuildRequest, build

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "demo"))

from corpus import Lighthouse, prompt  # noqa: E402
from scoring import MAX_NEW_TOKENS, LanguageModel, continuations  # noqa: E402

PREFIXES = HERE / "prefixes"
PEFT = "peft"


@dataclass(frozen=True)
class Build:
    """One way to build a bundle: its name in tables, and what `BuildRequest` is given."""

    label: str
    options: Mapping[str, Any]


BUILDS: Mapping[str, Build] = {
    "fp32": Build("float32", {}),
    "int8": Build("int8, blocks of 32", {"precision": "int8", "block_size": 32}),
    "int8-128": Build("int8, blocks of 128", {"precision": "int8", "block_size": 128}),
    "int8-cache": Build("int8, blocks of 32, int8 cache", {"precision": "int8", "block_size": 32, "cache": "int8"}),
    "int4-rtn": Build("int4, blocks of 32, rtn", {"precision": "int4", "block_size": 32, "quantizer": "rtn"}),
    "int4-hqq": Build("int4, blocks of 32, hqq", {"precision": "int4", "block_size": 32, "quantizer": "hqq"}),
}
LABELS: Mapping[str, str] = {PEFT: "PEFT, float32"} | {name: build.label for name, build in BUILDS.items()}


@dataclass(frozen=True)
class Subject:
    """The model and the adapters that are evaluated, and with how many threads."""

    base: Path
    prefixes: Path
    tasks: Sequence[str]
    threads: int | None = None

    def adapters(self) -> dict[str, Path]:
        """The adapter's folder for each task."""
        return {task: self.prefixes / task for task in self.tasks}


def peft_texts(
    subject: Subject, task: str, lights: Sequence[Lighthouse], *, device: str = "cpu", batch_size: int = 64
) -> list[str]:
    """What PEFT's float32 model writes for each table under the task's adapter."""
    base = AutoModelForCausalLM.from_pretrained(subject.base, dtype=torch.float32, device_map=device)
    model = PeftModel.from_pretrained(base, str(subject.prefixes / task)).eval()
    tokenizer = AutoTokenizer.from_pretrained(subject.base)
    prompts = [prompt(light) for light in lights]
    return continuations(cast(LanguageModel, model), tokenizer, prompts, batch_size=batch_size)


@contextmanager
def engine_of(
    subject: Subject, options: Mapping[str, Any], *, verify: bool, batch: int
) -> Iterator[prefix_runtime.Engine]:
    """An engine on a bundle that is built for this and removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bundle"
        build(BuildRequest(str(subject.base), subject.adapters(), output, verify=verify, **options))
        yield prefix_runtime.load(output, threads=subject.threads, max_batch=batch)


def runtime_texts(engine: prefix_runtime.Engine, task: str, lights: Sequence[Lighthouse]) -> list[str]:
    """What the runtime writes for each table under the task."""
    results = engine.generate([prompt(light) for light in lights], task=task, max_new_tokens=MAX_NEW_TOKENS)
    return [result.text or "" for result in results]
