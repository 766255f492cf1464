"""transformers' model on a GPU, over a cache that begins with a prefix: eager, or compiled over a static cache.

python cuda_torch.py BUNDLE MODEL DTYPE eager|compile

The prefixes are the product's, made for BUNDLE. Compiled is `torch.compile(mode="reduce-overhead")`: CUDA graphs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from protocol import Generation, serve
from transformers import DynamicCache, StaticCache

from prefix_export.models.random_model import random_base_model
from prefix_runtime import Bundle
from prefix_runtime.bench.inputs import random_prefix

_EAGER_TOKENS = 20  # each takes as long as fifty of the others

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Torch:
    """A model with the product's weights; greedy, each token read back, as whoever streams a text has to."""

    def __init__(self, bundle: str, model: str, dtype: str, mode: str) -> None:
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._model = random_base_model(model, self._dtype).model.cuda()
        self._bundle, self._mode = Bundle.open(bundle), mode
        self._compiled = torch.compile(self._static_step, mode="reduce-overhead", fullgraph=True)
        self._static: dict[int, StaticCache] = {}
        self._pairs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {0: []}

    @torch.no_grad()
    def generate(self, prefix_length: int, prompt: list[int], new_tokens: int) -> Generation:
        """One request."""
        if prefix_length not in self._pairs:
            layers = random_prefix(self._bundle, prefix_length, seed=0).sites["decoder"]  # the product's
            self._pairs[prefix_length] = [(self._row(layer.key), self._row(layer.value)) for layer in layers]
        if self._mode == "eager":
            step = prefill = self._eager(prefix_length)
            new_tokens = min(new_tokens, _EAGER_TOKENS)
        else:
            prefill, step = self._over_static_cache(prefix_length, prefix_length + len(prompt) + new_tokens)
        return self._run(prefill, step, prefix_length, prompt, new_tokens)

    def _row(self, array: object) -> torch.Tensor:
        return torch.tensor(array).to("cuda", self._dtype)[None]

    def _eager(self, length: int) -> Step:
        """Steps as transformers runs them by itself."""
        cache = DynamicCache()
        for index, pair in enumerate(self._pairs[length]):
            cache.update(*pair, index)

        def step(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            output = self._model(input_ids=ids, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            return output.logits[:, -1].argmax(-1, keepdim=True)

        return step

    def _over_static_cache(self, length: int, room: int) -> tuple[Step, Step]:
        """The prompt's step, and the compiled one."""
        cache = self._seeded(length, room)

        def prefill(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return self._static_step(ids, positions, cache)

        def step(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return self._compiled(ids, positions, cache).clone()

        return prefill, step

    def _static_step(self, ids: torch.Tensor, positions: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        output = self._model(input_ids=ids, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def _seeded(self, length: int, room: int) -> StaticCache:
        """A static cache that holds a prefix; made once for a length, by its first request, which is the longest."""
        if length not in self._static:
            config = self._model.config
            self._static[length] = StaticCache(config=config, max_cache_len=room)
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self._static[length].early_initialization(1, heads, head_dim, self._dtype, torch.device("cuda"))
        cache = self._static[length]
        cache.reset()
        for layer, pair in zip(cache.layers, self._pairs[length], strict=False):
            layer.update(*pair)
        return cache

    def _run(self, prefill: Step, step: Step, length: int, prompt: list[int], new_tokens: int) -> Generation:
        ids = torch.tensor([prompt], device="cuda")
        positions = torch.arange(length, length + len(prompt), device="cuda")[None]
        answer, run = Generation([], []), prefill
        for _ in range(new_tokens):
            started = time.perf_counter()
            ids = run(ids, positions)
            positions = positions[:, -1:] + 1
            answer.tokens.append(int(ids))
            answer.seconds.append(time.perf_counter() - started)
            run = step
        return answer


def main() -> None:
    """Serve what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("model")
    parser.add_argument("dtype")
    parser.add_argument("mode", choices=["eager", "compile"])
    arguments = parser.parse_args()
    serve(lambda: Torch(**vars(arguments)), "torch", "transformers")


if __name__ == "__main__":
    main()
