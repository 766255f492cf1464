"""`torch.compile` over transformers' static cache, the prefix in the cache.

python torch_compile.py MODEL PREFIXES THREADS [--frozen]

--frozen makes the weights constants, which inductor lays out for the processor anew. `mode="reduce-overhead"` is about
CUDA graphs and changes nothing here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from prefix_file import read_past
from protocol import Generation, greedy, serve
from torch._dynamo import config as dynamo_config
from torch._inductor import config as inductor_config
from transformers import AutoModelForCausalLM, StaticCache
from transformers.utils import logging


class Compiled:
    """A model compiled for each length of the cache and each length of the prompt, which the first request pays."""

    def __init__(self, model: Path, prefixes: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model).eval()
        self._prefixes = prefixes
        # Every shape is known and compiled for; the limit on compilations is meant for shapes that are not.
        dynamo_config.recompile_limit = 64
        self._step = torch.compile(self._model.forward, dynamic=False)
        self._caches: dict[tuple[int, int], StaticCache] = {}

    def generate(self, prefix_length: int, prompt: list[int], new_tokens: int) -> Generation:
        """One request, in a cache that holds the prefix already."""
        cache = self._seeded_cache(prefix_length, prefix_length + len(prompt) + new_tokens)
        position = prefix_length

        def step(fed: list[int]) -> int:
            nonlocal position
            positions = torch.arange(position, position + len(fed))[None]
            position += len(fed)
            output = self._step(
                input_ids=torch.tensor([fed]), position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            return int(output.logits[0, -1].argmax())

        with torch.no_grad():
            return greedy(step, prompt, new_tokens)

    def _seeded_cache(self, prefix_length: int, capacity: int) -> StaticCache:
        key = prefix_length, capacity
        if key not in self._caches:
            self._caches[key] = self._new_cache(capacity)
        cache = self._caches[key]
        cache.reset()
        if prefix_length:
            for layer, pair in zip(
                cache.layers, read_past(self._prefixes / f"p{prefix_length}.safetensors"), strict=True
            ):
                layer.update(*map(torch.from_numpy, pair))
        return cache

    def _new_cache(self, capacity: int) -> StaticCache:
        config = self._model.config
        cache = StaticCache(config=config, max_cache_len=capacity)
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache.early_initialization(1, heads, head_dim, torch.float32, torch.device("cpu"))
        return cache


def main() -> None:
    """Serve what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("prefixes", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("--frozen", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    inductor_config.freezing = arguments.frozen
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    serve(lambda: Compiled(arguments.model, arguments.prefixes), "torch", "transformers")


if __name__ == "__main__":
    main()
