"""What the peers need, made once: weights, adapters, bundles, graphs of others, converted weights."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from environments import python_of, run
from random_model import save_lora, save_random_adapter, save_random_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).parent
WORK = HERE.parents[1] / "build" / "compare"
PRECISIONS = {"float32": "fp32", "int8": "int8", "int4": "int4"}
"""The product's flags, by the names that reports use."""


@dataclass(frozen=True)
class Order:
    """What to make things for.

    Attributes:
        model: one of `random_model.CONFIGS`.
        lengths: of prefixes; 0 stands for none.
        longest_request: positions of prefix or what stands in for it, prompt and new tokens.
        threads: of every peer.
        folder: where environments and what was made are kept.
        pythons: interpreters to use in place of an environment of that name.
    """

    model: str
    lengths: Sequence[int]
    longest_request: int
    threads: int
    folder: Path
    pythons: Mapping[str, Path]


class Workshop:
    """Makes things under `build/compare/models/NAME` and keeps them, but for bundles: those test today's product."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.logs = order.folder / "logs" / order.model
        self._folder = order.folder / "models" / order.model
        self._bundles: dict[str, Path] = {}
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def python(self, environment: str) -> str:
        """The interpreter of an environment."""
        return python_of(environment, self.order.folder, self.order.pythons.get(environment))

    @cached_property
    def model(self) -> Path:
        """The folder of the weights, which every peer has from here."""
        return self._once("model", lambda folder: save_random_model(self.order.model, folder))

    @cached_property
    def adapters(self) -> Path:
        """The folder of PEFT's adapters: `p10` and so on, and `lora`."""
        parent = self._folder / "adapters"
        for length in filter(None, self.order.lengths):
            self._once(f"adapters/p{length}", lambda folder, at=length: save_random_adapter(self._fresh(), at, folder))
        self._once("adapters/lora", lambda folder: save_lora(self._fresh(), folder))
        return parent

    def bundle(self, precision: str, *options: str) -> Path:
        """The product's bundle, with a task for each prefix length; `options` are further ones of `build`."""
        name = "-".join(["bundle", precision, *(option.removeprefix("--") for option in options)])
        if name not in self._bundles:
            self._bundles[name] = self._build(name, precision, options)
        return self._bundles[name]

    @property
    def prefixes(self) -> Path:
        """The folder of the folded prefixes, `p10.safetensors` and so on."""
        return self.bundle("float32") / "prefixes"

    @cached_property
    def optimum_graph(self) -> Path:
        """The graph that optimum exports."""
        options = ["--model", str(self.model), "--task", "text-generation-with-past"]
        command = [self.python("optimum"), "-m", "optimum.commands.optimum_cli", "export", "onnx", *options]
        return self._once("optimum", lambda folder: self._run("optimum", *command, folder)) / "model.onnx"

    @cached_property
    def transformers_graph(self) -> Path:
        """The graph that transformers' own exporter makes."""
        return self._once("transformers", self._converter("to_transformers_onnx.py", self.model)) / "model.onnx"

    def gguf(self, kind: str) -> Path:
        """The weights for llama.cpp, as F32, Q8_0 or Q4_0."""
        script = str(HERE / "conversions" / "to_gguf.py")
        name, python = f"{kind}.gguf", self.python("llama")
        return self._once(name, lambda file: self._run(name, python, script, self.model, file, kind))

    @cached_property
    def genai_graph(self) -> Path:
        """Optimum's graph in a folder for onnxruntime-genai."""
        return self._once("genai-optimum", self._converter("genai_folder.py", "graph", self.model, self.optimum_graph))

    def genai(self, precision: str) -> Path:
        """What onnxruntime-genai's model builder makes, or its refusal."""
        source = self._once("genai-source", self._converter("genai_folder.py", "builder", self.model))
        flag, name = PRECISIONS[precision], f"genai-{precision}"
        builder = [self.python("genai"), "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", flag]
        cache = str(self._folder / "cache")
        return self._once(name, lambda folder: self._run(name, *builder, "-c", cache, "-i", source, "-o", folder))

    def _build(self, name: str, precision: str, further: Sequence[str]) -> Path:
        bundle = self._folder / name
        shutil.rmtree(bundle, ignore_errors=True)
        adapters = [str(self.adapters / f"p{length}") for length in self.order.lengths if length]
        prefixes = [option for adapter in adapters for option in ("--prefix", adapter)]
        chosen = ["--precision", PRECISIONS[precision], *further]
        options = ["--model", str(self.model), *prefixes, *chosen, "--no-verify", "--output", str(bundle)]
        self._run(bundle.name, sys.executable, "-m", "prefix_export", "build", *options)
        return bundle

    def _fresh(self) -> AutoModelForCausalLM:
        """The model; PEFT writes into what it is given."""
        return AutoModelForCausalLM.from_pretrained(self.model)

    def _converter(self, script: str, *arguments: str | Path) -> Callable[[Path], None]:
        command = [sys.executable, str(HERE / "conversions" / script), *arguments]
        return lambda output: self._run(output.stem, *command, output)

    def _run(self, name: str, *command: str | Path) -> None:
        run([str(part) for part in command], self.logs / f"make-{name}.log")

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        """A file or folder by this name: there whole from an earlier run, or made and then moved into place."""
        path = self._folder / name
        if not path.exists():
            print(f"making {path}", file=sys.stderr)
            unfinished = path.with_name(f"unfinished-{path.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.unlink(missing_ok=True)
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            make(unfinished)
            unfinished.rename(path)
        return path
