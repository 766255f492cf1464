"""A whole model for each task, as merging makes them, each in an engine of its own.

python merged.py BUNDLE THREADS
"""

from __future__ import annotations

import sys
import time

from protocol import serve

import prefix_runtime


class Merged:
    """Models are opened when they are asked for, and stay open."""

    def __init__(self, bundle: str, threads: int) -> None:
        self._bundle, self._threads = bundle, threads
        self._engines: list[prefix_runtime.Engine] = []

    def answer_each(self, tasks: int) -> dict[str, list[float]]:
        """Seconds to open each model, which then answers one short request."""
        return {"first request": [self._open_another() for _ in range(tasks)]}

    def _open_another(self) -> float:
        started = time.perf_counter()
        self._engines.append(prefix_runtime.load(self._bundle, threads=self._threads, prepare=False))
        seconds = time.perf_counter() - started
        self._engines[-1].generate(token_ids=[1], max_new_tokens=2)
        return seconds


if __name__ == "__main__":
    serve(lambda: Merged(sys.argv[1], int(sys.argv[2])), "onnxruntime")
