"""What a bench's rows are asked: random prefixes and prompts, the same for the same row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.prefix.cache_format import LARGEST
from prefix_runtime.prefix.prefix import LayerPrefix, Prefix

from .plan import BenchRow


def random_prefix(bundle: Bundle, length: int, seed: int | None = None) -> Prefix:
    """A prefix of a length that fits a bundle, the same for the same seed; text begins at position `length`."""
    random = np.random.default_rng(length if seed is None else seed)
    manifest = bundle.manifest
    shapes = [(2, layer.key_value_heads, length, layer.head_dim) for layer in manifest.geometry.layers]
    pairs = [LayerPrefix(*random.standard_normal(shape, np.float32)) for shape in shapes]
    if scales := bundle.cache_format.scales:
        # Within what 8 bits reach, each channel by its own scale.
        layers = zip(pairs, scales, strict=True)
        pairs = [LayerPrefix(_within(pair.key, scale.key), _within(pair.value, scale.value)) for pair, scale in layers]
    if manifest.cache == "fp16":  # as `build` keeps them
        pairs = [LayerPrefix(pair.key.astype(np.float16), pair.value.astype(np.float16)) for pair in pairs]
    return Prefix({"decoder": tuple(pairs)}, position_base=length)


def _within(numbers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    clipped: np.ndarray = np.clip(32 * numbers, -LARGEST, LARGEST).astype(np.float32) * scale
    return clipped


def random_prompts(bundle: Bundle, row: BenchRow) -> list[list[int]]:
    """Token ids for each row of a batch."""
    random = np.random.default_rng(row.prompt_length)
    size = (row.batch_size, row.prompt_length)
    prompts: list[list[int]] = random.integers(bundle.manifest.geometry.vocab_size, size=size).tolist()
    return prompts


def free_name(name: str, taken: Sequence[str]) -> str:
    """A task's name that is not taken."""
    lowered = {other.lower() for other in taken}
    while name in lowered:
        name += "_"
    return name
