"""The product, as it is deployed: without torch.

python product.py BUNDLE THREADS [--as-text] [--small-pages] [--kept]
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from protocol import Generation, serve, stand_in

import prefix_runtime
from prefix_runtime.bench.inputs import random_prefix
from prefix_runtime.bench.measurements import Subject

TASKS = 100
_DISABLE_HUGE_PAGES = 41  # PR_SET_THP_DISABLE of prctl(2)


class Product:
    """An engine whose tasks are called after their prefix lengths, `p200`; with `as_text` text takes the prefix' place.

    The text is part of the request, and so of the time to the first token. With `small_pages` the process gets no huge
    pages. With `kept` the graph is opened as it was packed and kept beside the bundle, before if need be.
    """

    def __init__(self, bundle: str, threads: int, as_text: bool, small_pages: bool, kept: bool) -> None:
        if small_pages and ctypes.CDLL(None).prctl(_DISABLE_HUGE_PAGES, 1, 0, 0, 0):
            raise OSError("the system does not let a process do without huge pages")
        os.environ["PREFIX_RUNTIME_CACHE"] = str(Path(bundle).with_name("kept")) if kept else os.devnull
        self._engine = prefix_runtime.load(bundle, threads=threads, prepare=kept)
        self._subject = Subject.of(self._engine.bundle)
        self._bundle, self._threads, self._as_text = bundle, threads, as_text

    def generate(self, prefix_length: int, prompt: list[int], new_tokens: int) -> Generation:
        """One request."""
        if self._as_text:
            prompt, prefix_length = stand_in(prefix_length) + prompt, 0
        task = f"p{prefix_length}" if prefix_length else None
        result = self._engine.generate(token_ids=prompt, task=task, max_new_tokens=new_tokens)
        metrics = result.metrics
        seconds = [metrics.time_to_first_token, *metrics.inter_token_latencies]
        positions = prefix_length + len(prompt) + new_tokens / 2
        step_bytes = self._subject.weight_bytes + self._subject.key_value_bytes(positions)
        return Generation(list(result.token_ids), seconds, step_bytes)

    def select(self, prefix_length: int, cache_bytes: int) -> dict[str, list[float]]:
        """Seconds to select each of 100 tasks, asked for in turn: each one's first request, then its second."""
        engine = prefix_runtime.load(self._bundle, threads=self._threads, cache_bytes=cache_bytes, prepare=False)
        names = [f"selected-{index}" for index in range(TASKS)]
        for index, name in enumerate(names):
            engine.add_task(name, random_prefix(engine.bundle, prefix_length, index))
        return _answer_twice(engine, names)

    def answer_each(self) -> dict[str, list[float]]:
        """Seconds to select each of the bundle's tasks: its first request, then its second."""
        return _answer_twice(self._engine, self._engine.tasks)


def _answer_twice(engine: prefix_runtime.Engine, names: Sequence[str]) -> dict[str, list[float]]:
    return {"first request": _answer_each(engine, names), "later requests": _answer_each(engine, names)}


def _answer_each(engine: prefix_runtime.Engine, names: Sequence[str]) -> list[float]:
    """One short request of every task in turn; seconds that selecting it took."""
    results = (engine.generate(token_ids=[1], task=name, max_new_tokens=2) for name in names)
    return [result.metrics.task_selection for result in results]


def main() -> None:
    """Serve what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("threads", type=int)
    parser.add_argument("--as-text", action="store_true")
    parser.add_argument("--small-pages", action="store_true")
    parser.add_argument("--kept", action="store_true")
    arguments = parser.parse_args()
    serve(lambda: Product(**vars(arguments)), "onnxruntime")


if __name__ == "__main__":
    main()
