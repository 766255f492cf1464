"""Keys and values of all layers in one piece of a GPU's memory, so that a prefix is copied in one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefix_runtime.prefix.geometry import Geometry, LayerGeometry

from .blocks import Blocks

if TYPE_CHECKING:
    from .device import Device, Stream


@dataclass(frozen=True)
class _Group:
    """Layers of one shape, which lie one behind the other; `start` is the first byte."""

    start: int
    layers: tuple[int, ...]
    heads: int
    position_bytes: int


class DeviceBuffer:
    """Keys and values of each layer, [rows, num_key_value_heads, length, head_dim], in one piece of memory.

    Layers of one shape lie one behind the other, keys before values: the same positions of all of them are equally far
    apart.

    Args:
        device: the GPU.
        geometry: the model's.
        itemsize: bytes of a number.
        rows: of the batch.
        length: positions of each row.
        first_user: the stream that writes it first; None for the engine's.

    Attributes:
        rows, length: as given.
        nbytes: of all.

    Raises:
        ProviderError: the GPU has no room.
    """

    def __init__(
        self,
        device: Device,
        geometry: Geometry,
        itemsize: int,
        rows: int,
        length: int,
        *,
        first_user: Stream | None = None,
    ) -> None:
        self.rows, self.length = rows, length
        self._groups: list[_Group] = []
        self._places: dict[int, tuple[_Group, int]] = {}
        start = 0
        for layer, indices in _by_shape(geometry.layers):
            group = _Group(start, indices, layer.key_value_heads, layer.head_dim * itemsize)
            self._groups.append(group)
            self._places |= {index: (group, place) for place, index in enumerate(indices)}
            start += 2 * len(indices) * self._row_bytes(group) * rows
        self.nbytes = start
        self._memory, self._stream = device.allocate(start, first_user), device.stream
        # Made once: a request of another task than before waits for each step of Python here.
        self._blocks = [[self._row_blocks(group, row) for row in range(rows)] for group in self._groups]

    def address(self, layer: int, part: int, row: int = 0) -> int:
        """Where a row of a layer's keys (part 0) or values (part 1) begins."""
        group, place = self._places[layer]
        return self._memory.address + group.start + ((2 * place + part) * self.rows + row) * self._row_bytes(group)

    def copy_row(self, row: int, source: DeviceBuffer, source_row: int, length: int, start: int = 0) -> None:
        """Copy a row's first positions, from `start` on, from another row, or another buffer of the same model."""
        for group, ours, theirs in zip(self._groups, self._blocks, source._blocks, strict=True):
            self._stream.copy_blocks(
                ours[row].moved(start * group.position_bytes),
                theirs[source_row].moved(start * group.position_bytes),
                width=(length - start) * group.position_bytes,
                height=group.heads,
                depth=2 * len(group.layers),
            )

    def _row_bytes(self, group: _Group) -> int:
        return group.heads * self.length * group.position_bytes

    def _row_blocks(self, group: _Group, row: int) -> Blocks:
        start = self._memory.address + group.start + row * self._row_bytes(group)
        return Blocks(start, pitch=self.length * group.position_bytes, height=self.rows * group.heads)


def _by_shape(layers: Sequence[LayerGeometry]) -> Iterator[tuple[LayerGeometry, tuple[int, ...]]]:
    for shape in dict.fromkeys(layers):
        yield shape, tuple(index for index, layer in enumerate(layers) if layer == shape)
