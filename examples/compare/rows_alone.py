"""Sampled rows of a batch beside each row alone: how many part, and after how many tokens.

    python examples/compare/rows_alone.py BUNDLE [--rounds 10]

Eight rows under random prefixes of different lengths (the first under none), with prompts and answers of different
lengths, each sampled at temperature 1 with a seed of its own; then each row again by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import prefix_runtime
from prefix_runtime.bench.inputs import random_prefix

PREFIX_LENGTHS = (3, 10, 17, 40, 64, 100, 200)


def parted_at(together: list[int], alone: list[int]) -> int | None:
    """The first token that differs."""
    return next((place for place, pair in enumerate(zip(together, alone, strict=True)) if pair[0] != pair[1]), None)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    lengths = {f"random-{length}": length for length in PREFIX_LENGTHS}
    tasks = [None, *lengths]
    engine = prefix_runtime.load(given.bundle, threads=given.threads, max_batch=len(tasks), prepare=False)
    for name, length in lengths.items():
        engine.add_task(name, random_prefix(engine.bundle, length))
    tokens, random = engine.bundle.manifest.geometry.vocab_size, np.random.default_rng(0)
    same, parted = 0, list[int]()
    for turn in range(given.rounds):
        requests: list[dict[str, Any]] = [
            {
                "token_ids": random.integers(5, tokens, random.integers(2, 60)).tolist(),
                "task": task,
                "max_new_tokens": int(random.integers(8, 48)),
                "sampling": prefix_runtime.Sampling(temperature=1, seed=turn * len(tasks) + row),
            }
            for row, task in enumerate(tasks)
        ]
        options: dict[str, Any] = {name: [request[name] for request in requests] for name in requests[0]}
        for row, request in zip(engine.generate(**options, ignore_end=True), requests, strict=True):
            place = parted_at(row.token_ids, engine.generate(**request, ignore_end=True).token_ids)
            same += len(row.token_ids) if place is None else place
            parted += [] if place is None else [place]
    rows = given.rounds * len(tasks)
    print(f"{len(parted)} of {rows} rows part from the row alone, after {parted} tokens; {same} alike")


if __name__ == "__main__":
    main()
