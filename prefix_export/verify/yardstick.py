"""How far the source framework itself is from the truth: the yardstick that a graph is measured with.

The truth is the source model in double precision. One run of the framework at the graph's precision shows one draw of
its rounding errors, and on some prompts that draw is small by luck. So the yardstick is the largest error of several
runs, all but the first with noise of the size of rounding behind each layer.

Sources: Parker, "Monte Carlo Arithmetic", UCLA, 1997, for the noise; Higham and Mary, "A New Approach to Probabilistic
Rounding Error Analysis", SIAM J. Sci. Comput. 41(5), 2019, for its size: a sum of n terms is off by about sqrt(n) units
of rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefix_export.prefixes.reference import Reference
from prefix_runtime import LayerPrefix
from prefix_runtime.prefix.cache_format import LARGEST

_NOISY_RUNS = 3
_JITTER = 1e-3
"""Of a step: float32 leaves keys and values off by a millionth, and a step of 8 bits is 1/127 of the largest."""
_LANES = 16
"""Sums that a vector unit of 512 bits makes side by side; each is of so many times fewer terms."""


@dataclass(frozen=True)
class Arithmetic:
    """What a graph computes with.

    Attributes:
        activations: the type of activations.
        cache: the type that keys and values are kept in, if that is a narrower one.
        scales: for int8 each layer's, [num_key_value_heads, 1, head_dim] float32; a kept number times its scale is the
            value.
    """

    activations: torch.dtype = torch.float32
    cache: torch.dtype | None = None
    scales: Sequence[LayerPrefix] | None = None


def largest_difference(left: np.ndarray, right: np.ndarray) -> float:
    """The largest difference of two arrays of one shape; NaN if a number of either is none."""
    return float(np.abs(left - right).max())


def own_error(
    reference: Reference, model: PreTrainedModel, prompt: Sequence[int], truth: np.ndarray, dtype: torch.dtype
) -> float:
    """The source framework's own largest error of a logit on a prompt, over several runs.

    Args:
        reference: the framework's model under a task.
        model: the base model that it runs, in `dtype`.
        prompt: token ids.
        truth: its logits [sequence, vocab] in double precision.
        dtype: of the activations.
    """
    errors = [largest_difference(reference.logits(prompt), truth)]
    for seed in range(_NOISY_RUNS):
        with _noise(model, dtype, seed):
            errors.append(largest_difference(reference.logits(prompt), truth))
    return float(np.max(errors))  # not Python's max, which drops a NaN


class RoundedCache(DynamicCache):
    """transformers' cache, which keeps keys and values in a narrower type, as the graph's does.

    In 8 bits attention reads the new ones as they are kept. In 16 bits it reads the new ones as they are, and those of
    earlier runs as they were kept.

    Args:
        arithmetic: what the graph computes with.
        jitter: moves each number by up to `_JITTER` of a step before it is rounded, as another order of sums would;
            None moves none.
    """

    def __init__(self, arithmetic: Arithmetic, jitter: torch.Generator | None = None) -> None:
        super().__init__()
        self._arithmetic, self._jitter = arithmetic, jitter

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention reads of a layer's keys and values, [batch, num_key_value_heads, length, head_dim] each."""
        scale = self._arithmetic.scales[layer_idx] if self._arithmetic.scales is not None else None
        key, value = (
            self._rounded(states, None if scale is None else getattr(scale, part))
            for states, part in ((key_states, "key"), (value_states, "value"))
        )
        read: tuple[torch.Tensor, torch.Tensor] = super().update(key, value, layer_idx, *args, **kwargs)
        if scale is not None:
            return read
        key, value = (
            torch.cat([all_states[:, :, : -states.shape[2]], states], 2)
            for all_states, states in zip(read, (key_states, value_states), strict=True)
        )
        return key, value

    def _rounded(self, states: torch.Tensor, scale: np.ndarray | None) -> torch.Tensor:
        if scale is not None:
            step = torch.from_numpy(np.array(scale)).to(states.dtype)
            return self._steps(states, step).clamp(-LARGEST, LARGEST) * step
        assert self._arithmetic.cache is not None
        # Not `to`, which double precision makes a conversion to float64.
        kind = torch.finfo(self._arithmetic.cache)
        exponent = torch.frexp(states).exponent.clamp(min=round(math.log2(kind.smallest_normal)) + 1)
        step = torch.ldexp(torch.full_like(states, kind.eps / 2), exponent)
        return self._steps(states, step) * step

    def _steps(self, states: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        steps = states / step
        if self._jitter is not None:
            steps = steps + _JITTER * (torch.rand(steps.shape, generator=self._jitter) * 2 - 1).to(steps.dtype)
        return steps.round()


@contextmanager
def _noise(model: PreTrainedModel, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Multiply each output of a module with weights by 1 + noise of rounding's size, for a while."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        if not (isinstance(output, torch.Tensor) and output.is_floating_point()):
            return output
        noise = torch.rand(output.shape, generator=generator) * 2 - 1
        return (output.float() * (1 + rounding_of(module, dtype) * noise)).to(output.dtype)

    weighted = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(disturb) for module in weighted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounding_of(module: torch.nn.Module, dtype: torch.dtype) -> float:
    """How far off a module's output is by rounding, as a part of it: by its sums, which are float32, or by its type."""
    in_sums = math.sqrt(_terms(module) / _LANES) * torch.finfo(torch.float32).eps / 2
    return max(in_sums, torch.finfo(dtype).eps / 2)


def _terms(module: torch.nn.Module) -> int:
    """How many products a number of a module's output is the sum of."""
    weight = getattr(module, "weight", None)
    if isinstance(module, torch.nn.Embedding) or weight is None or weight.dim() != 2:
        return 1
    return int(weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1])
