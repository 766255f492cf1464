"""The inputs of a bench's rows: random prefixes and prompts, the same for the same row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.prefix.cache_format import LARGEST
from prefix_runtime.prefix.geometry import LayerGeometry
from prefix_runtime.prefix.prefix import DECODER, LayerPrefix, Prefix

from .plan import BenchRow


def random_prefix(bundle: Bundle, length: int, seed: int | None = None) -> Prefix:
    """A random prefix for a bundle, the same for the same seed.

    Args:
        bundle: the bundle.
        length: positions of the prefix; text begins behind them.
        seed: the seed; None takes the length.
    """
    random = np.random.default_rng(length if seed is None else seed)
    manifest = bundle.manifest
    sites = {site: _random_layers(random, layers, length) for site, layers in manifest.geometry.sites.items()}
    if scales := bundle.cache_format.scales:
        # Within the range of int8, with the scale of each channel.
        layers = zip(sites[DECODER], scales, strict=True)
        sites[DECODER] = [
            LayerPrefix(_within(own.key, scale.key), _within(own.value, scale.value)) for own, scale in layers
        ]
    if manifest.cache == "fp16":  # as `build` stores prefixes
        sites = {site: [_in_float16(layer) for layer in layers] for site, layers in sites.items()}
    return Prefix({site: tuple(layers) for site, layers in sites.items()}, position_base=length)


def _random_layers(random: np.random.Generator, layers: Sequence[LayerGeometry], length: int) -> list[LayerPrefix]:
    shapes = [(2, layer.key_value_heads, length, layer.head_dim) for layer in layers]
    return [LayerPrefix(*random.standard_normal(shape, np.float32)) for shape in shapes]


def _in_float16(layer: LayerPrefix) -> LayerPrefix:
    return LayerPrefix(layer.key.astype(np.float16), layer.value.astype(np.float16))


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
