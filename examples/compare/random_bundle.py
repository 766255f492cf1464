"""Build a bundle of a known geometry with random weights and random prefixes, and say what each step took.

    python examples/compare/random_bundle.py llama-8b OUTPUT --target cuda --prefixes 8 --prefix-length 200

The peak memory is this process' own, weights included.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from prefix_export.build import BuildRequest
from prefix_export.build.random_bundle import build_random


class Steps:
    """Prints each phase's seconds when the next one begins; implements `prefix_export.progress.Progress`."""

    def __init__(self) -> None:
        self._name, self._since = "", time.perf_counter()

    def phase(self, name: str, total: int | None = None, *, detail: str = "", unit: str = "") -> None:  # noqa: ARG002
        """A phase begins."""
        now = time.perf_counter()
        if self._name:
            print(f"{now - self._since:7.1f} s  {self._name}", flush=True)
        self._name, self._since = name, now

    def advance(self, steps: float = 1) -> None:
        """Steps within a phase are not shown."""


def main() -> None:
    """Build, and print seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="one that `prefix-export bench --random` knows, or a folder with a config.json")
    parser.add_argument("output", type=Path)
    parser.add_argument("--target", default="cuda")
    parser.add_argument("--precision", help="default: the target's")
    parser.add_argument("--prefixes", type=int, default=1, help="tasks t0, t1 and so on")
    parser.add_argument("--prefix-length", type=int, default=200)
    given = parser.parse_args()
    steps = Steps()
    request = BuildRequest(given.model, {}, given.output, target=given.target, precision=given.precision)
    result = build_random(request, given.prefixes, given.prefix_length, steps)
    steps.phase("")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    read = result.bundle.manifest.weight_bytes
    print(f"{result.seconds:7.1f} s  all; a step reads {read / 1e9:.2f} GB of weights; peak memory {peak / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
