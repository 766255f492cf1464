"""Rows of several tasks as one batch, against one row, and against rows of one task, in rounds of changing order.

    python examples/compare/batches.py BUNDLE [--rows 8] [--prefix-length 200]

Random prefixes of one length are added to the bundle's engine. Prints tokens a second of a whole `generate` and the
median decode step; ratios are taken within a round, then their median with the first and third quartile.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from figures import quartiles, show

import prefix_runtime
from prefix_runtime.bench.inputs import random_prefix


def measure(engine: prefix_runtime.Engine, tasks: list[str], prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Tokens a second of a batch with a row for each task, and seconds of its median decode step."""
    started = time.perf_counter()
    rows = engine.generate(token_ids=[prompt] * len(tasks), task=tasks, max_new_tokens=new_tokens, ignore_end=True)
    seconds = time.perf_counter() - started
    steps = [row.metrics.inter_token_latency for row in rows]
    return sum(row.metrics.new_tokens for row in rows) / seconds, float(np.median(steps))


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    bundle, threads = arguments.bundle, arguments.threads
    engine = prefix_runtime.load(bundle, threads=threads, max_batch=arguments.rows, prepare=False)
    names = [f"random-{index}" for index in range(arguments.rows)]
    prefix = random_prefix(engine.bundle, arguments.prefix_length)
    for name in names:
        engine.add_task(name, prefix_runtime.Prefix(dict(prefix.sites), prefix.position_base))
    prompt = list(range(5, 5 + arguments.prompt_length))
    kinds = {
        "one row": names[:1],
        f"{arguments.rows} rows of one task": names[:1] * arguments.rows,
        f"{arguments.rows} rows of {arguments.rows} tasks": names,
    }
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    random = np.random.default_rng(0)
    for turn in range(arguments.rounds + 1):
        for kind in random.permutation(list(kinds)):
            figures = measure(engine, kinds[kind], prompt, arguments.new_tokens)
            if turn:  # the first round warms up
                found[kind].append(figures)
    report(found)


def report(found: dict[str, list[tuple[float, float]]]) -> None:
    """Print the figures and their ratios."""
    for kind, rounds in found.items():
        speeds, steps = zip(*rounds, strict=True)
        print(f"{kind}: {show(quartiles(speeds), 1, 1)} tokens a second, {show(quartiles(steps), 1e3)} ms a step")
    one, alike, mixed = found.values()
    for what, over, under, field in (
        ("tokens a second, tasks / one row", mixed, one, 0),
        ("a step, tasks / one task", mixed, alike, 1),
        ("tokens a second, tasks / one task", mixed, alike, 0),
    ):
        ratios = [left[field] / right[field] for left, right in zip(over, under, strict=True)]
        print(f"{what}: {show(quartiles(ratios), 1, 3)}")


def parse_arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prefix-length", type=int, default=200)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
