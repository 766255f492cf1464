"""The inputs of a bench's rows: random prefixes and prompts, the same for the same row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.prefix.cache_format import LARGEST, in_float16
from prefix_runtime.prefix.prefix import DECODER, LayerPrefix, Prefix
from prefix_runtime.prefix.random_prefix import random_prefix as random_prefix_of

from .plan import BenchRow


def random_prefix(bundle: Bundle, length: int, seed: int | None = None) -> Prefix:
    """A random prefix for a bundle, the same for the same seed.

    Args:
        bundle: the bundle.
        length: positions of the prefix; text begins behind them.
        seed: the seed; None takes the length.
    """
    prefix = random_prefix_of(bundle.manifest.geometry, length, length if seed is None else seed)
    if scales := bundle.cache_format.scales:
        # Within the range of int8, with the scale of each channel.
        layers = zip(prefix.sites[DECODER], scales, strict=True)
        scaled = [LayerPrefix(_within(own.key, scale.key), _within(own.value, scale.value)) for own, scale in layers]
        return replace(prefix, sites={**prefix.sites, DECODER: tuple(scaled)})
    return in_float16(prefix) if bundle.manifest.cache == "fp16" else prefix  # as `build` stores prefixes


def _within(numbers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    clipped: np.ndarray = np.clip(32 * numbers, -LARGEST, LARGEST).astype(np.float32) * scale
    return clipped


def random_prompts(bundle: Bundle, row: BenchRow) -> list[list[int]]:
    """Random token ids for each row of a batch."""
    random = np.random.default_rng(row.prompt_length)
    size = (row.batch_size, row.prompt_length)
    prompts: list[list[int]] = random.integers(bundle.manifest.geometry.vocab_size, size=size).tolist()
    return prompts


def free_name(name: str, tasks: Sequence[str]) -> str:
    """The name, with underscores behind it if there is already a task of that name."""
    lowered = {other.lower() for other in tasks}
    while name in lowered:
        name += "_"
    return name
