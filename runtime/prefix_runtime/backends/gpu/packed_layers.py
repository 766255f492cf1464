"""Keys and values of all layers as a graph of the portable flavour reads and returns them, on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from prefix_runtime.bundle.graph_contract import PARTS, tensor_name
from prefix_runtime.prefix.geometry import Geometry

from .blocks import Blocks

if TYPE_CHECKING:
    from .device import Device


class PackedLayers:
    """Keys and values of each layer, [rows, num_key_value_heads, length, head_dim], with no room between rows.

    The memory has room for `capacity` positions of each row; how many there are changes with each run.

    Args:
        device: the GPU.
        geometry: the model's.
        itemsize: bytes of a number.
        rows: at the most.
        capacity: positions of each row, at the most.

    Attributes:
        rows, length: that there are now.
    """

    def __init__(self, device: Device, geometry: Geometry, itemsize: int, rows: int, capacity: int) -> None:
        self._geometry, self._itemsize, self._stream = geometry, itemsize, device.stream
        self.rows, self.length = rows, 0
        sizes = [rows * capacity * layer.key_value_heads * layer.head_dim * itemsize for layer in geometry.layers]
        self._starts = np.cumsum([0, *np.repeat(sizes, len(PARTS))]).tolist()
        self._memory = device.allocate(self._starts[-1])

    def address(self, layer: int, part: int) -> int:
        """Where a layer's keys (part 0) or values (part 1) begin."""
        start: int = self._starts[len(PARTS) * layer + part]
        return self._memory.address + start

    def tensors(self, name: str) -> Iterator[tuple[str, tuple[int, tuple[int, ...]]]]:
        """The tensors `NAME.{layer}.key`, `.value`, each with its address and shape."""
        for index, layer in enumerate(self._geometry.layers):
            shape = (self.rows, layer.key_value_heads, self.length, layer.head_dim)
            for part, part_name in enumerate(PARTS):
                yield tensor_name(name, index, part_name), (self.address(index, part), shape)

    def upload(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]], dtype: np.dtype) -> None:
        """Fill one row with each layer's keys and values, [num_key_value_heads, length, head_dim] on the host."""
        for index, pair in enumerate(pairs):
            for part, array in enumerate(pair):
                self.length = array.shape[1]
                self._stream.upload(self.address(index, part), np.ascontiguousarray(array, dtype))

    def clear(self) -> None:
        """Fill all that there is with zeros."""
        for index, layer in enumerate(self._geometry.layers):
            numbers = self.rows * layer.key_value_heads * self.length * layer.head_dim
            for part in range(len(PARTS)):
                self._stream.upload(self.address(index, part), np.zeros(numbers * self._itemsize, np.uint8))

    def copy_row(self, row: int, source: PackedLayers, source_row: int, length: int) -> None:
        """Let the last positions of a row be the last ones of another's, `length` of them."""
        for index, layer in enumerate(self._geometry.layers):
            for part in range(len(PARTS)):
                self._stream.copy_blocks(
                    self._last(index, part, row, length),
                    source._last(index, part, source_row, length),
                    width=length * layer.head_dim * self._itemsize,
                    height=layer.key_value_heads,
                    depth=1,
                )

    def _last(self, index: int, part: int, row: int, length: int) -> Blocks:
        """The last positions of a row, a piece for each head."""
        layer = self._geometry.layers[index]
        position = layer.head_dim * self._itemsize
        pitch = self.length * position
        start = self.address(index, part) + row * layer.key_value_heads * pitch + (self.length - length) * position
        return Blocks(start, pitch=pitch, height=layer.key_value_heads)
