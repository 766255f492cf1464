"""onnxruntime's session options on a bundle's graph: what a decode step and an opening take with each, interleaved.

    python examples/compare/session_options.py BUNDLE

Every option gets a session of its own on the same graph; each round takes all in another order. Steps are the
runtime's own, on its own buffers, behind a prompt of 32 tokens. Ratios are taken within a round, against the second
session of the defaults.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from figures import markdown_table, quartiles, show

from prefix_runtime import Bundle
from prefix_runtime.backends.onnxruntime.binding import Binding
from prefix_runtime.backends.onnxruntime.shared_cache import SharedCache
from prefix_runtime.prefix.cache_format import CacheFormat

PROMPT, STEPS = 32, 32


def entry(name: str, value: str) -> Callable[[ort.SessionOptions], None]:
    """Sets a configuration entry."""
    return lambda options: options.add_session_config_entry(name, value)


def attribute(name: str, value: object) -> Callable[[ort.SessionOptions], None]:
    """Sets an attribute."""
    return lambda options: setattr(options, name, value)


OPTIONS: dict[str, Callable[[ort.SessionOptions], None]] = {
    "defaults": lambda _: None,
    "defaults, again": lambda _: None,  # a process' first session is 2 to 4 % slower than its later ones
    "no spinning": entry("session.intra_op.allow_spinning", "0"),
    "no arena": attribute("enable_cpu_mem_arena", False),
    "no memory patterns": attribute("enable_mem_pattern", False),
    "no prepacking": entry("session.disable_prepacking", "1"),
    "denormals as zero": entry("session.set_denormal_as_zero", "1"),
    "dynamic block base 4": entry("session.dynamic_block_base", "4"),
    "basic optimisations alone": attribute("graph_optimization_level", ort.GraphOptimizationLevel.ORT_ENABLE_BASIC),
}


@dataclass
class Contestant:
    """A session of the graph, its buffers, and what was measured."""

    cache: SharedCache
    opening: float
    seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Prefill, then note the median of some decode steps."""
        self.cache.seed(0, None)
        self.cache.prefill(0, list(range(5, 5 + PROMPT)))
        times = [time.perf_counter()]
        for _ in range(STEPS):
            self.cache.step([5])
            times.append(time.perf_counter())
        self.seconds.append(float(np.median(np.diff(times))))


class GivenSession:
    """A session as the runtime knows it, of options of ours."""

    device = None

    def __init__(self, path: Path, options: ort.SessionOptions) -> None:
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def ask(self, work: Callable[[ort.InferenceSession], Any]) -> Any:
        """As the runtime's own."""
        return work(self._session)

    def binding(self) -> Binding:
        """As the runtime's own."""
        return Binding(self)  # type: ignore[arg-type]


def open_with(bundle: Bundle, choose: Callable[[ort.SessionOptions], None], threads: int) -> Contestant:
    """A contestant whose session has one option set."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    choose(options)
    started = time.perf_counter()
    session = GivenSession(bundle.graph_path, options)
    opening = time.perf_counter() - started
    manifest = bundle.manifest
    cache_format = CacheFormat.of_bundle(bundle.root, manifest.cache, manifest.geometry)
    cache = SharedCache(session, manifest.geometry, 1, PROMPT + STEPS, cache_format)  # type: ignore[arg-type]
    return Contestant(cache, opening)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    contestants = {name: open_with(bundle, choose, arguments.threads) for name, choose in OPTIONS.items()}
    random = np.random.default_rng(0)
    for _ in range(arguments.rounds + 1):
        for index in random.permutation(len(contestants)):
            list(contestants.values())[index].measure()
    usual = contestants["defaults, again"].seconds[1:]  # the first round warms up
    rows = []
    for name, contestant in contestants.items():
        seconds = contestant.seconds[1:]
        ratios = [own / other for own, other in zip(seconds, usual, strict=True)]
        opening = f"{contestant.opening:.2f}"
        rows.append((name, show(quartiles(seconds), 1e3), show(quartiles(ratios), 1, 3), opening))
    print("\n".join(markdown_table(("option", "ms a step", "/ defaults", "s to open"), rows)))


if __name__ == "__main__":
    main()
