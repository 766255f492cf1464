"""Prefixes of random numbers, to measure before anything is trained."""

from __future__ import annotations

import numpy as np

from .geometry import Geometry
from .prefix import LayerPrefix, Prefix


def random_prefix(geometry: Geometry, length: int, seed: int) -> Prefix:
    """A prefix of normal random numbers for every site of a model, float32; the same for the same seed.

    Text begins at position `length`.
    """
    random = np.random.default_rng(seed)
    shapes = {
        site: [(2, layer.key_value_heads, length, layer.head_dim) for layer in layers]
        for site, layers in geometry.sites.items()
    }
    sites = {
        site: tuple(LayerPrefix(*random.standard_normal(shape, np.float32)) for shape in each)
        for site, each in shapes.items()
    }
    return Prefix(sites, position_base=length)
