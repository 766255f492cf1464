"""What keys and values are kept in: float32, float16, bfloat16, or 8 bits with a scale for each channel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prefix_runtime.errors import BundleError, PrefixError, PrefixMismatchError

from .geometry import Geometry
from .prefix import DECODER, LayerPrefix, Prefix
from .tensor_file import TensorFile

CACHE_TYPES: dict[str, np.dtype] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),  # numpy has no bfloat16: its bits
    "int8": np.dtype(np.int8),
}
"""By the manifest's name."""

SCALES_NAME = "cache_scales.safetensors"
"""The bundle's file of scales: `{layer}.key` and `{layer}.value` [num_key_value_heads, 1, head_dim] float32."""

LARGEST = 127
"""Of the kept numbers: symmetric, -128 is not used."""


@dataclass(frozen=True)
class CacheFormat:
    """What the keys and values of a graph's past and present are kept in.

    Attributes:
        dtype: of the arrays; uint16 stands for bfloat16's bits.
        scales: for int8 each layer's, [num_key_value_heads, 1, head_dim] float32; a kept number times its scale is the
            value. The graph knows the same. None for others.
    """

    dtype: np.dtype
    scales: tuple[LayerPrefix, ...] | None = None

    @classmethod
    def of_bundle(cls, root: Path, cache: str, geometry: Geometry) -> CacheFormat:
        """The format of a bundle in a folder, by its manifest's name for it.

        Raises:
            BundleError: the file of scales is damaged or does not fit the model.
        """
        dtype = CACHE_TYPES[cache]
        return cls(dtype, _read_scales(root / SCALES_NAME, geometry) if dtype == np.int8 else None)

    def stored(self, prefix: Prefix, site: str = DECODER) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Each layer's keys and values as a site keeps them, [num_key_value_heads, prefix_length, head_dim].

        Nothing if the prefix has no keys and values at this site. Scales are those of the decoder's self-attention.
        """
        layers = prefix.sites.get(site, ())
        if self.dtype == CACHE_TYPES["bf16"]:
            return ((bfloat16_bits(layer.key), bfloat16_bits(layer.value)) for layer in layers)
        if self.scales is None:
            return ((layer.key, layer.value) for layer in layers)
        pairs = zip(layers, self.scales, strict=True)
        return ((_rounded(layer.key, scale.key), _rounded(layer.value, scale.value)) for layer, scale in pairs)

    def check(self, prefix: Prefix, where: str) -> None:
        """Refuse a prefix that goes beyond what 8 bits reach with these scales; `where` names it in the message.

        Raises:
            PrefixMismatchError: build the bundle again with this prefix, or with a float32 cache.
        """
        for index, (layer, scale) in enumerate(zip(prefix.sites.get(DECODER, ()), self.scales or (), strict=False)):
            for name, array, step in (("key", layer.key, scale.key), ("value", layer.value, scale.value)):
                reached = float(np.abs(array / step).max()) / LARGEST
                if reached > 1.01:
                    raise PrefixMismatchError(
                        f"{where}: layer {index}, {name}: expected numbers that the bundle's 8-bit cache reaches, "
                        f"found one {reached:.2f} times as large; build the bundle anew with this prefix, or with "
                        "--cache fp32"
                    )


def in_float16(prefix: Prefix) -> Prefix:
    """The prefix with keys and values in float16, as a float16 cache stores it, in half the bytes."""
    sites = {
        site: tuple(LayerPrefix(layer.key.astype(np.float16), layer.value.astype(np.float16)) for layer in layers)
        for site, layers in prefix.sites.items()
    }
    return replace(prefix, sites=sites)


def bfloat16_bits(array: np.ndarray) -> np.ndarray:
    """Finite floats rounded to bfloat16, to nearest, ties to even, as its bits, uint16."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    # The half below the kept one, less one where that is even, carries into it as rounding does.
    rounded: np.ndarray = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return rounded


def _rounded(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.clip(np.rint(array / scale), -LARGEST, LARGEST).astype(np.int8)
    return rounded


def _read_scales(path: Path, geometry: Geometry) -> tuple[LayerPrefix, ...]:
    try:
        file = TensorFile(path)
        return tuple(
            LayerPrefix(*(_scale(file, f"{index}.{part}", layer.key_value_heads, layer.head_dim) for part in _PARTS))
            for index, layer in enumerate(geometry.layers)
        )
    except PrefixError as error:
        raise BundleError(str(error)) from error


_PARTS = ("key", "value")


def _scale(file: TensorFile, name: str, heads: int, head_dim: int) -> np.ndarray:
    expected = (heads, 1, head_dim)
    shape = file.tensors[name].shape if name in file.tensors else None
    if shape != expected:
        raise BundleError(f"{file.path}: tensor {name!r}: expected shape {expected}, found {shape or 'none'}")
    array = file.array(name)
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise BundleError(f"{file.path}: tensor {name!r}: expected numbers above 0, found others")
    return array
