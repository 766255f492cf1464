"""What a prefix costs on a GPU, beside torch on the same weights and the same prefix, in one process and one run.

python gpu.py --model gpt2-medium --rounds 5 --steps 200 --output gpu-gpt2-medium

Writes OUTPUT.json and OUTPUT.md. A row is a contestant at a prefix length; every row runs once a round, the rounds in
shuffled order. A latency is what passes on the host from one token to the next, the token read back included.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from figures import markdown_table, quartiles, show
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

import prefix_runtime
from prefix_export.build import BuildRequest
from prefix_export.random_bundle import build_random
from prefix_export.random_model import random_base_model
from prefix_runtime import Cuda, Prefix
from prefix_runtime.bench_inputs import random_prefix
from prefix_runtime.machine import versions

PROMPT = [5 + index for index in range(32)]
EAGER_STEPS = 20  # each takes as long as fifty of the others


@dataclass
class Row:
    """A contestant at a prefix length: how it answers, and each round's median latency and first token."""

    name: str
    prefix_length: int
    answer: Callable[[], tuple[list[int], list[float]]]
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def run(self) -> None:
        """Answer once, and note what it took."""
        self.tokens, seconds = self.answer()
        self.first_tokens.append(seconds[0])
        self.latencies.append(float(np.median(seconds[1:])))


class Product:
    """An engine on the GPU, with a task for each prefix."""

    def __init__(self, bundle: Path, prefixes: dict[int, Prefix], options: Cuda, steps: int) -> None:
        self.engine = prefix_runtime.load(bundle, provider=options, max_batch=32, cache_bytes=8 << 30)
        self._steps = steps
        for length, prefix in prefixes.items():
            self.engine.add_task(f"p{length}", prefix)

    def answer(self, length: int) -> tuple[list[int], list[float]]:
        """One request, greedy."""
        task = f"p{length}" if length else None
        result = self.engine.generate(token_ids=PROMPT, task=task, max_new_tokens=self._steps + 1, ignore_end=True)
        metrics = result.metrics
        return list(result.token_ids), [metrics.time_to_first_token, *metrics.inter_token_latencies]

    def together(self, tasks: Sequence[str]) -> float:
        """Median latency of a batch, a row for each task."""
        results = self.engine.generate(
            token_ids=[PROMPT] * len(tasks), task=tasks, max_new_tokens=self._steps + 1, ignore_end=True
        )
        return float(np.median(results[0].metrics.inter_token_latencies))

    def first_token(self, task: str) -> float:
        """Seconds from the request to its first token."""
        result = self.engine.generate(token_ids=PROMPT, task=task, max_new_tokens=1, ignore_end=True)
        return result.metrics.time_to_first_token


class Torch:
    """transformers' model, over its own caches that begin with a prefix; compiled over a static one, or eager."""

    def __init__(self, model: str, dtype: torch.dtype, prefixes: dict[int, Prefix], steps: int) -> None:
        self.model = random_base_model(model, dtype).model.cuda()
        self._prefixes, self._steps, self._dtype = prefixes, steps, dtype
        self._compiled = torch.compile(self._static_step, mode="reduce-overhead", fullgraph=True)
        self._static: dict[int, StaticCache] = {}

    @torch.no_grad()
    def eager(self, length: int) -> tuple[list[int], list[float]]:
        """One request, as transformers runs it by itself."""
        cache = DynamicCache()
        for index, pair in enumerate(self._pairs(length)):
            cache.update(*pair, index)

        def step(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            output = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            return output.logits[:, -1].argmax(-1, keepdim=True)

        return self._run(step, step, length, min(self._steps, EAGER_STEPS))

    @torch.no_grad()
    def compiled(self, length: int) -> tuple[list[int], list[float]]:
        """One request, its decode steps compiled with `mode="reduce-overhead"`: CUDA graphs over a static cache."""
        cache = self._seeded(length)

        def step(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return self._compiled(ids, positions, cache).clone()

        def prefill(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return self._static_step(ids, positions, cache)

        return self._run(prefill, step, length, self._steps)

    def _static_step(self, ids: torch.Tensor, positions: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        output = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def _run(self, prefill: Any, step: Any, length: int, steps: int) -> tuple[list[int], list[float]]:
        ids = torch.tensor([PROMPT], device="cuda")
        positions = torch.arange(length, length + len(PROMPT), device="cuda")[None]
        tokens, seconds, run = [], [], prefill
        for _ in range(steps + 1):
            started = time.perf_counter()
            ids = run(ids, positions)
            positions = positions[:, -1:] + 1
            tokens.append(int(ids))  # read back, as whoever streams a text has to
            seconds.append(time.perf_counter() - started)
            run = step
        return tokens, seconds

    def _pairs(self, length: int) -> list[list[torch.Tensor]]:
        if not length:
            return []
        pairs = [(layer.key, layer.value) for layer in self._prefixes[length].sites["decoder"]]
        return [[torch.tensor(part).to("cuda", self._dtype)[None] for part in pair] for pair in pairs]

    def _seeded(self, length: int) -> StaticCache:
        if length not in self._static:
            room = length + len(PROMPT) + self._steps + 1
            self._static[length] = StaticCache(config=self.model.config, max_cache_len=room)
            config = self.model.config
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self._static[length].early_initialization(1, heads, head_dim, self._dtype, torch.device("cuda"))
        cache = self._static[length]
        cache.reset()
        for layer, pair in zip(cache.layers, self._pairs(length), strict=False):
            layer.update(*pair)
        return cache


def copy_bandwidth() -> float:
    """Bytes that a copy on the GPU reads and writes a second: the best of a few."""
    source = torch.ones(2 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = 0.0
    for _ in range(10):
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (begin.elapsed_time(end) / 1000))
    return best


def switching(product: Product, pairs: int) -> dict[str, float]:
    """Seconds to the first token more where another task asked before than in the same task's next request."""
    tasks = [f"switch-{index}" for index in range(2)]
    more = []
    for pair in range(pairs + 2):  # of these the first ones warm up
        another, same = (product.first_token(tasks[pair % 2]) for _ in range(2))
        more.append(another - same)
    return quartiles(more[2:])


def rounds_of(rows: Sequence[Row], rounds: int) -> None:
    """Run every row once a round; the first round warms up and is forgotten."""
    random = np.random.default_rng(0)
    for number in range(rounds + 1):
        for index in random.permutation(len(rows)):
            rows[index].run()
        print(f"round {number} of {rounds}", flush=True)
    for row in rows:
        del row.latencies[0], row.first_tokens[0]


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of two rows, within each round."""
    return quartiles([first / second for first, second in zip(above, below, strict=True)])


def measure(arguments: argparse.Namespace, workshop: Path) -> dict[str, Any]:
    """All figures, in seconds and bytes."""
    bundle = workshop / "bundle"
    if not bundle.exists():
        build_random(BuildRequest(arguments.model, {}, bundle, target="cuda", precision=arguments.precision))
    opened = prefix_runtime.Bundle.open(bundle)
    lengths = [length for length in arguments.prefix_lengths if length]
    prefixes = {length: random_prefix(opened, length) for length in lengths}
    started = time.perf_counter()
    product = Product(bundle, prefixes, Cuda(), arguments.steps)
    opening = time.perf_counter() - started
    rows = [
        Row("prefix-export", length, lambda length=length: product.answer(length))
        for length in arguments.prefix_lengths
    ]
    if "no-graphs" in arguments.peers:
        plain = Product(bundle, prefixes, Cuda(uses_graphs=False), arguments.steps)
        rows += [
            Row("prefix-export, no CUDA graphs", length, lambda length=length: plain.answer(length))
            for length in arguments.prefix_lengths
        ]
    if {"eager", "compile"} & set(arguments.peers):
        dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float16
        peer = Torch(arguments.model, dtype, prefixes, arguments.steps)
        for name, answer in {"eager": peer.eager, "compile": peer.compiled}.items():
            if name in arguments.peers:
                rows += [
                    Row(f"torch, {name}", length, lambda length=length, answer=answer: answer(length))
                    for length in arguments.prefix_lengths
                ]
    rounds_of(rows, arguments.rounds)
    found = _summary(arguments, rows, opened.manifest.weight_bytes) | {"opening": opening}
    return found | _tasks(arguments, opened, bundle, product)


def _summary(arguments: argparse.Namespace, rows: Sequence[Row], weight_bytes: int) -> dict[str, Any]:
    bandwidth = copy_bandwidth()
    product = {row.prefix_length: row for row in rows if row.name == "prefix-export"}
    return {
        "command": f"python examples/compare/gpu.py {' '.join(Path(part).name for part in arguments.given)}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "versions": versions() | {"torch": torch.__version__, "transformers": transformers.__version__},
        "weight_bytes": weight_bytes,
        "bytes_per_second": bandwidth,
        "floor": weight_bytes / bandwidth,
        "rows": [
            {
                "name": row.name,
                "prefix_length": row.prefix_length,
                "latency": quartiles(row.latencies),
                "first_token": quartiles(row.first_tokens),
                "against the product": ratio(product[row.prefix_length].latencies, row.latencies),
                "tokens": _agreeing(product[row.prefix_length].tokens, row.tokens),
            }
            for row in rows
        ],
        "prefix/none": {
            length: ratio(row.latencies, product[min(product)].latencies) for length, row in product.items() if length
        },
    }


def _agreeing(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that two answers begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, pair in pairs if pair[0] != pair[1]), min(len(left), len(right)))


def _tasks(
    arguments: argparse.Namespace, opened: prefix_runtime.Bundle, bundle: Path, product: Product
) -> dict[str, Any]:
    """Batches of many tasks and of one; and going from one task to another."""
    length = max(arguments.prefix_lengths)
    many = [f"many-{index}" for index in range(arguments.batch)]
    for index, task in enumerate(many):
        product.engine.add_task(task, random_prefix(opened, length, seed=index))
    for index in range(2):
        product.engine.add_task(f"switch-{index}", random_prefix(opened, length, seed=index))
    batches: dict[str, list[float]] = {"many": [], "one": []}
    for _ in range(arguments.rounds + 1):
        batches["many"].append(product.together(many))
        batches["one"].append(product.together(many[:1] * arguments.batch))
    resident = switching(product, 51)
    del product.engine
    gc.collect()
    away = Product(bundle, {}, Cuda(prefix_bytes=0), arguments.steps)
    for index in range(2):
        away.engine.add_task(f"switch-{index}", random_prefix(opened, length, seed=index))
    return {
        "batch": arguments.batch,
        "batch of many tasks": quartiles(batches["many"][1:]),
        "batch of one task": quartiles(batches["one"][1:]),
        "many/one": ratio(batches["many"][1:], batches["one"][1:]),
        "switch, on the GPU": resident,
        "switch, on the host": switching(away, 21),
    }


def as_markdown(found: dict[str, Any]) -> str:
    """The figures as tables, in milliseconds."""
    lines = [
        f"`{found['command']}`",
        "",
        f"{found['gpu']}, {found['created'][:10]}, {', '.join(map(' '.join, found['versions'].items()))}.",
        "",
        f"{found['weight_bytes'] / 1e6:.0f} MB of weights, a copy moves {found['bytes_per_second'] / 1e12:.2f} TB/s:",
        f"a floor of {found['floor'] * 1e3:.3f} ms a token. Medians [quartiles] of rounds; ratios within rounds.",
        "",
    ]
    header = ("", "prefix", "ms a token", "product / this", "to the first, ms", "first tokens alike")
    table = [
        (
            row["name"],
            row["prefix_length"],
            show(row["latency"], 1e3, 3),
            show(row["against the product"]),
            show(row["first_token"], 1e3),
            row["tokens"],
        )
        for row in found["rows"]
    ]
    lines += [*markdown_table(header, table), ""]
    many, one = (show(found[f"batch of {name}"], 1e3, 3) for name in ("many tasks", "one task"))
    near, far = (show(found[f"switch, on the {place}"], 1e3, 3) for place in ("GPU", "host"))
    lines += [f"- prefix {length} / none: {show(figure, 1, 3)}" for length, figure in found["prefix/none"].items()]
    lines += [
        f"- {found['batch']} rows of as many tasks, ms a step: {many}; of one {one}",
        f"- ratio of these: {show(found['many/one'], 1, 3)}",
        f"- another task than before, ms to the first token more: its prefix on the GPU {near}, on the host {far}",
        f"- opening {found['opening']:.1f} s",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line asks for and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-medium", help="of prefix_export.random_model")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--prefix-lengths", type=int, nargs="+", default=[0, 200])
    parser.add_argument("--peers", nargs="*", default=["compile", "eager", "no-graphs"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--workshop", type=Path, help="folder for model and bundle, which stay; default: a temporary one"
    )
    parser.add_argument("--output", type=Path, required=True, help="without .json and .md")
    arguments = parser.parse_args()
    arguments.given = sys.argv[1:]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with nullcontext(arguments.workshop) if arguments.workshop else tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    arguments.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(as_markdown(found))
    print(as_markdown(found))


if __name__ == "__main__":
    main()
