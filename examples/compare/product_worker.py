"""The product in a process of its own, as it is deployed: without torch; answers requests on standard input.

A request is JSON, `{"generate": [token ids, task, new tokens]}` or `{"select": [prefix length, cache bytes]}`; so is
the answer.
"""

from __future__ import annotations

import json
import sys

import numpy as np

import prefix_runtime

TASKS = 100


def generate(engine: prefix_runtime.Engine, prompt: list[int], task: str | None, new_tokens: int) -> dict[str, float]:
    """Seconds to the first token, and of a decode step, the median."""
    metrics = engine.generate(token_ids=prompt, task=task, max_new_tokens=new_tokens).metrics
    return {"first_token": metrics.time_to_first_token, "inter_token": metrics.inter_token_latency}


def select(engine: prefix_runtime.Engine, length: int) -> dict[str, list[float]]:
    """Seconds to select each of 100 tasks, asked for in turn: each one's first request, then its second."""
    layers = engine.bundle.manifest.geometry.layers
    random = np.random.default_rng(0)
    names = [f"selected-{index}" for index in range(TASKS)]
    for name in names:
        shapes = [(2, layer.key_value_heads, length, layer.head_dim) for layer in layers]
        pairs = tuple(prefix_runtime.LayerPrefix(*random.standard_normal(shape, np.float32)) for shape in shapes)
        engine.add_task(name, prefix_runtime.Prefix({"decoder": pairs}, position_base=length))
    first, later = (
        [engine.generate(token_ids=[1], task=name, max_new_tokens=2).metrics.task_selection for name in names]
        for _ in range(2)
    )
    return {"first request": first, "later requests": later}


def main() -> None:
    """Serve the bundle and the threads that the command line names."""
    bundle, threads = sys.argv[1], int(sys.argv[2])
    engine = prefix_runtime.load(bundle, threads=threads)
    for line in sys.stdin:
        request = json.loads(line)
        if "generate" in request:
            answer = generate(engine, *request["generate"])
        else:
            length, cache_bytes = request["select"]
            answer = select(prefix_runtime.load(bundle, threads=threads, cache_bytes=cache_bytes), length)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
