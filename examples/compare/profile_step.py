"""Where a decode step goes, operator by operator, by onnxruntime's profile.

    python examples/compare/profile_step.py BUNDLE [--prefix-length 200]

Milliseconds that the kernels of each operator take in a step, medians of 50 steps of one row under a random prefix.
Profiling itself lengthens a step, by a third of a small one.
"""

from __future__ import annotations

import argparse
import bisect
import json
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime as ort

import prefix_runtime
from prefix_runtime.bench.bandwidth import BandwidthProbe
from prefix_runtime.bench.inputs import random_prefix

STEPS, WARM_UP = 50, 14
LEAST = 0.05
"""Milliseconds of an operator that is listed by itself."""


class Profiled(ort.InferenceSession):
    """A session that writes down what it runs."""

    opened: Profiled
    folder: str

    def __init__(self, path: Any, sess_options: ort.SessionOptions, **options: Any) -> None:
        sess_options.enable_profiling = True
        sess_options.profile_file_prefix = f"{Profiled.folder}/profile"
        super().__init__(path, sess_options, **options)
        Profiled.opened = self


def by_operator(events: list[dict[str, Any]]) -> list[Counter[str]]:
    """Of each of the last steps: milliseconds by operator; what no kernel takes under "rest"."""
    runs = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")[-STEPS:]
    found = [Counter({"rest": duration / 1e3}) for _, duration in runs]
    for event in events:
        if event["cat"] != "Node" or not event["name"].endswith("kernel_time"):
            continue
        place = bisect.bisect_right(runs, (event["ts"], float("inf"))) - 1
        if place >= 0 and event["ts"] < sum(runs[place]):
            found[place][event["args"]["op_name"]] += event["dur"] / 1e3
            found[place]["rest"] -= event["dur"] / 1e3
    return found


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prefix-length", type=int, default=0)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    probe = BandwidthProbe(given.threads)
    before = probe.measure() / 1e9
    with tempfile.TemporaryDirectory() as Profiled.folder:
        report(profiled(given))
    print(f"memory read at {before:.0f} GB/s before, {probe.measure() / 1e9:.0f} behind")


def profiled(given: argparse.Namespace) -> list[Counter[str]]:
    """As `by_operator`, of a request."""
    ort.InferenceSession = Profiled
    engine = prefix_runtime.load(given.bundle, threads=given.threads, prepare=False)
    task = None
    if given.prefix_length:
        engine.add_task(task := "random", random_prefix(engine.bundle, given.prefix_length))
    prompt = list(range(5, 5 + given.prompt_length))
    engine.generate(token_ids=prompt, task=task, max_new_tokens=WARM_UP + STEPS, ignore_end=True)
    return by_operator(json.loads(Path(Profiled.opened.end_profiling()).read_text()))


def report(steps: list[Counter[str]]) -> None:
    """Print the medians."""
    medians = {name: median(step[name] for step in steps) for name in set().union(*steps)}
    small = sum(value for name, value in medians.items() if name != "rest" and value < LEAST)
    for name, value in sorted(medians.items(), key=lambda item: -item[1]):
        if name != "rest" and value >= LEAST:
            print(f"{name}: {value:.2f}")
    print(f"other operators: {small:.2f}\nbetween kernels: {medians['rest']:.2f}")


if __name__ == "__main__":
    main()
