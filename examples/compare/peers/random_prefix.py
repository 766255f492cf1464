"""Prefixes of random numbers, without torch."""

from __future__ import annotations

import numpy as np

from prefix_runtime import Geometry, LayerPrefix, Prefix


def random_prefix(geometry: Geometry, length: int, seed: int) -> Prefix:
    """One that fits a model, like no other of another seed."""
    random = np.random.default_rng(seed)
    shapes = [(2, layer.key_value_heads, length, layer.head_dim) for layer in geometry.layers]
    pairs = tuple(LayerPrefix(*random.standard_normal(shape, np.float32)) for shape in shapes)
    return Prefix({"decoder": pairs}, position_base=length)
