"""The product against PEFT's eager `generate`, on the same weights, prefix and prompt, interleaved in one run.

    python examples/compare/peft_eager.py

Prints, and with --output writes as JSON: inter-token latency and time to first token at several prefix lengths, their
ratios, and what it costs to select among 100 tasks. A round runs every contestant once, so that a machine that becomes
slow is slow for all; ratios are taken within a round, then their median with the first and third quartile. The
floor of a decode step is the time to read the weights once at the bandwidth that the machine reads memory at.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from random_adapter import save_random_adapter
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from prefix_export.build import BuildRequest, build
from prefix_export.random_model import KNOWN, save_random_model

CACHE_GIBIBYTES = (2, 8)
"""Of key/value buffers in the measurement of selection: the runtime's default, and room for all 100 tasks."""


@dataclass(frozen=True)
class Timing:
    """One generation: seconds to the first token, and of a decode step, the median."""

    first_token: float
    inter_token: float


@dataclass(frozen=True)
class Quartiles:
    """A median with its spread."""

    first: float
    median: float
    third: float

    def show(self, scale: float = 1.0, digits: int = 2) -> str:
        """`median [first, third]`, scaled."""
        return f"{self.median * scale:.{digits}f} [{self.first * scale:.{digits}f}, {self.third * scale:.{digits}f}]"


class _Clock(BaseStreamer):
    """Notes when each token comes; transformers hands over the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002  # transformers names it
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def time_eager(model: PreTrainedModel | PeftModel, prompt: Sequence[int], new_tokens: int) -> Timing:
    """PEFT's, or for the bare model transformers', `generate`."""
    ids = torch.tensor([prompt])
    clock = _Clock()
    started = time.perf_counter()
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
    tokens = np.array(clock.times[1:])
    return Timing(float(tokens[0] - started), float(np.median(np.diff(tokens))))


class Product:
    """The product in a process of its own, idle while the other contestant runs."""

    def __init__(self, bundle: Path, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("product_worker.py")), str(bundle), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def time(self, task: str | None, prompt: Sequence[int], new_tokens: int) -> Timing:
        """One `generate`."""
        return Timing(**self._ask({"generate": [list(prompt), task, new_tokens]}))

    def time_selection(self, length: int, cache_bytes: int) -> dict[str, Quartiles]:
        """Seconds to select each of 100 tasks of a prefix length, in turn, with room for so many bytes of buffers."""
        return {when: quartiles(seconds) for when, seconds in self._ask({"select": [length, cache_bytes]}).items()}

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of some figures."""
    return Quartiles(*(float(value) for value in np.percentile(values, (25, 50, 75))))


def run_rounds(contestants: dict[str, Callable[[], Timing]], rounds: int) -> dict[str, list[Timing]]:
    """Every contestant's timings, one a round; the first round warms up and is left out."""
    timings: dict[str, list[Timing]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            timings[name].append(run())
    return {name: found[1:] for name, found in timings.items()}


def ratio(timings: dict[str, list[Timing]], over: str, under: str, field: str) -> Quartiles:
    """A field of one contestant over another's, round by round."""
    pairs = zip(timings[over], timings[under], strict=True)
    return quartiles([getattr(left, field) / getattr(right, field) for left, right in pairs])


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(arguments, Path(folder))
    print(_table(report))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build the model, the adapters and the bundle, run the rounds, and report."""
    save_random_model(arguments.model, folder / "model")
    adapters = {length: folder / f"p{length}" for length in arguments.prefix_lengths if length}
    for length, adapter in adapters.items():
        save_random_adapter(AutoModelForCausalLM.from_pretrained(folder / "model"), length, adapter)
    prefixes = {adapter.name: adapter for adapter in adapters.values()}
    built = build(BuildRequest(str(folder / "model"), prefixes, folder / "bundle"))
    product = Product(folder / "bundle", arguments.threads)
    timings = run_rounds(_contestants(arguments, folder / "model", adapters, product), arguments.rounds)
    selection = {
        (length, gib): product.time_selection(length, gib << 30)
        for length in arguments.selection_lengths
        for gib in CACHE_GIBIBYTES
    }
    product.close()
    return {
        "command": "python examples/compare/peft_eager.py " + " ".join(sys.argv[1:]),
        "machine": f"{_processor()}, {arguments.threads} threads, {platform.system()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "onnxruntime")},
        "floor, seconds": _weight_bytes(folder / "model") / read_bandwidth(),
        "largest logit difference": max(result.largest_logit_difference for result in built.parity.values()),
        "seconds": {name: _summary(found) for name, found in timings.items()},
        "ratios": _ratios(timings, min(arguments.prefix_lengths), max(arguments.prefix_lengths)),
        "task selection": {
            f"100 tasks of prefix length {length}, {gib} GiB of buffers": {
                when: asdict(row) for when, row in found.items()
            }
            for (length, gib), found in selection.items()
        },
    }


def _contestants(
    arguments: argparse.Namespace, folder: Path, adapters: dict[int, Path], product: Product
) -> dict[str, Callable[[], Timing]]:
    """Eager and product at every prefix length, side by side."""
    bare = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = np.random.default_rng(0).integers(bare.config.vocab_size, size=arguments.prompt_length).tolist()
    contestants: dict[str, Callable[[], Timing]] = {}
    for length in arguments.prefix_lengths:
        model = PeftModel.from_pretrained(bare, adapters[length]).eval() if length else bare
        task = adapters[length].name if length else None
        contestants[f"eager, prefix {length}"] = partial(time_eager, model, prompt, arguments.new_tokens)
        contestants[f"product, prefix {length}"] = partial(product.time, task, prompt, arguments.new_tokens)
    return contestants


def _summary(timings: Sequence[Timing]) -> dict[str, dict[str, float]]:
    return {
        field: asdict(quartiles([getattr(timing, field) for timing in timings]))
        for field in ("first_token", "inter_token")
    }


def _ratios(timings: dict[str, list[Timing]], shortest: int, longest: int) -> dict[str, dict[str, float]]:
    wanted = {
        f"inter-token latency, product / eager, prefix {length}": (
            f"product, prefix {length}",
            f"eager, prefix {length}",
            "inter_token",
        )
        for length in (shortest, longest)
    }
    ends = (f"product, prefix {longest}", f"product, prefix {shortest}")
    wanted[f"inter-token latency, product, prefix {longest} / {shortest}"] = (*ends, "inter_token")
    wanted[f"time to first token, product, prefix {longest} / {shortest}"] = (*ends, "first_token")
    return {name: asdict(ratio(timings, *which)) for name, which in wanted.items()}


def read_bandwidth() -> float:
    """Bytes a second that torch reads when it sums 1.6 GB, the best of some runs."""
    numbers = torch.ones(400_000_000)

    def seconds() -> float:
        started = time.perf_counter()
        numbers.sum()
        return time.perf_counter() - started

    return numbers.nbytes / min(seconds() for _ in range(8))


def _weight_bytes(folder: Path) -> int:
    """Of the weights that a decode step reads: all but the table of positions."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    positions = model.get_submodule("transformer.wpe").weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - positions


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _table(report: dict[str, Any]) -> str:
    lines = [report["command"], report["machine"], ""]
    lines.append(f"{'median [quartiles]':<24}{'inter-token, ms':>28}{'first token, ms':>28}")
    for name, row in report["seconds"].items():
        cells = [Quartiles(**row[field]).show(1e3) for field in ("inter_token", "first_token")]
        lines.append(f"{name:<24}{cells[0]:>28}{cells[1]:>28}")
    lines += [f"{'floor, prefix 0':<24}{report['floor, seconds'] * 1e3:>28.2f}", ""]
    lines += [f"{name:<52}{Quartiles(**row).show(1, 3):>26}" for name, row in report["ratios"].items()]
    lines.append("")
    for name, passes in report["task selection"].items():
        lines += [f"select among {name}, {when}, ms: {Quartiles(**row).show(1e3, 3)}" for when, row in passes.items()]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(KNOWN), default="gpt2-medium")
    parser.add_argument("--prefix-lengths", type=int, nargs="+", default=[0, 10, 50, 100, 200])
    parser.add_argument("--selection-lengths", type=int, nargs="*", default=[10, 200], help="of a hundred tasks each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the report there as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
