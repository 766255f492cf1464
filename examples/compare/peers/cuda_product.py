"""The product on a GPU, as it is deployed: without torch.

python cuda_product.py BUNDLE [--no-graphs] [--on-host]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from protocol import Generation, serve

import prefix_runtime
from prefix_runtime import Cuda
from prefix_runtime.bench.inputs import random_prefix

_CACHE_BYTES = 8 << 30


class Product:
    """An engine; tasks are called after their prefix' length and seed.

    Args:
        bundle: its folder.
        no_graphs: run each step as a prompt is run, without CUDA graphs.
        on_host: let no prefix stay on the GPU but the last one.
    """

    def __init__(self, bundle: str, no_graphs: bool, on_host: bool) -> None:
        room = {"prefix_bytes": 0} if on_host else {}
        options = Cuda(uses_graphs=not no_graphs, **room)
        self._engine = prefix_runtime.load(bundle, provider=options, max_batch=32, cache_bytes=_CACHE_BYTES)

    def generate(self, prefix_length: int, prompt: list[int], new_tokens: int) -> Generation:
        """One request, greedy."""
        result = self._ask(prompt, self._task(prefix_length), new_tokens)
        metrics = result.metrics
        return Generation(list(result.token_ids), [metrics.time_to_first_token, *metrics.inter_token_latencies])

    def batch(self, prefix_length: int, rows: int, tasks: int, prompt: list[int], new_tokens: int) -> dict[str, float]:
        """The median latency of a batch, whose rows take some tasks in turn."""
        names = [self._task(prefix_length, index % tasks) for index in range(rows)]
        results = self._engine.generate(
            token_ids=[prompt] * rows, task=names, max_new_tokens=new_tokens, ignore_end=True
        )
        return {"inter_token": results[0].metrics.inter_token_latency}

    def switch(self, prefix_length: int, pairs: int, prompt: list[int]) -> dict[str, list[float]]:
        """Seconds to the first token where another task asked before, and in the same task's next request."""
        names = [self._task(prefix_length, index) for index in range(2)]
        seconds = [[self._first_token(names[pair % 2], prompt) for _ in range(2)] for pair in range(pairs)]
        another, same = zip(*seconds, strict=True)
        return {"another": list(another), "same": list(same)}

    def _first_token(self, task: str | None, prompt: list[int]) -> float:
        return self._ask(prompt, task, 1).metrics.time_to_first_token

    def _ask(self, prompt: Sequence[int], task: str | None, new_tokens: int) -> prefix_runtime.GenerationResult:
        return self._engine.generate(token_ids=prompt, task=task, max_new_tokens=new_tokens, ignore_end=True)

    def _task(self, prefix_length: int, seed: int = 0) -> str | None:
        if not prefix_length:
            return None
        name = f"p{prefix_length}-{seed}"
        if name not in self._engine.tasks:
            self._engine.add_task(name, random_prefix(self._engine.bundle, prefix_length, seed))
        return name


def main() -> None:
    """Serve what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--on-host", action="store_true")
    arguments = parser.parse_args()
    serve(lambda: Product(**vars(arguments)), "onnxruntime-gpu", "numpy")


if __name__ == "__main__":
    main()
