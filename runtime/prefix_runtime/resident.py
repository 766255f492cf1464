"""Prefixes that lie on a GPU, from where a task's request copies its own; the least recently used are let go of."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .cache_format import CacheFormat
from .device_buffer import DeviceBuffer
from .geometry import Geometry
from .prefix import Prefix

if TYPE_CHECKING:
    from .device import Device, Event

_STAGING_BYTES = 4 << 20
"""Of page-locked memory that a prefix passes through, in turns of two: one is filled while the other is copied."""


@dataclass(frozen=True)
class Resident:
    """A prefix on a GPU.

    Attributes:
        buffer: of one row, as long as the prefix.
        arrived: over when all of it is there.
    """

    buffer: DeviceBuffer
    arrived: Event


class ResidentPrefixes:
    """The prefixes that lie on a GPU, at most so many bytes of them; safe to use from many threads.

    A prefix is brought in when it is first asked for, on a stream of its own: what else runs goes on meanwhile, and
    what needs it waits on the GPU alone.

    Args:
        device: the GPU.
        geometry: the model's.
        cache_format: what keys and values are kept in.
        budget: bytes; the prefix that was asked for last stays, whatever it takes.
    """

    def __init__(self, device: Device, geometry: Geometry, cache_format: CacheFormat, budget: int) -> None:
        self._device, self._geometry, self._format, self._budget = device, geometry, cache_format, budget
        self._lock, self._staging_lock = threading.Lock(), threading.Lock()
        self._held: OrderedDict[int, tuple[Prefix, Resident]] = OrderedDict()  # by identity: equality reads all numbers
        self._bytes = 0
        self._staging = [device.pinned((_STAGING_BYTES,), np.dtype(np.uint8)) for _ in range(2)]
        self._copied = [device.new_event() for _ in self._staging]

    def get(self, prefix: Prefix) -> Resident:
        """A prefix' place on the GPU; it may be on its way still.

        Raises:
            ProviderError: the GPU has no room for it.
        """
        if (found := self._find(prefix)) is not None:
            return found
        with self._staging_lock:
            if (found := self._find(prefix)) is not None:  # another thread was faster
                return found
            resident = self._brought_in(prefix)
            with self._lock:
                self._held[id(prefix)] = prefix, resident
                self._bytes += resident.buffer.nbytes
        return resident

    def forget(self, prefix: Prefix) -> None:
        """Let go of a prefix, if it is there."""
        with self._lock:
            self._drop(id(prefix))

    @property
    def nbytes(self) -> int:
        """Bytes that prefixes take."""
        with self._lock:
            return self._bytes

    def _find(self, prefix: Prefix) -> Resident | None:
        with self._lock:
            if (found := self._held.get(id(prefix))) is None:
                return None
            self._held.move_to_end(id(prefix))
            return found[1]

    def _drop(self, key: int) -> None:
        if (found := self._held.pop(key, None)) is not None:
            self._bytes -= found[1].buffer.nbytes

    def _brought_in(self, prefix: Prefix) -> Resident:
        needed = prefix.prefix_length * self._format.dtype.itemsize * self._geometry.values_per_position
        with self._lock:
            while self._held and self._bytes + needed > self._budget:
                self._drop(next(iter(self._held)))
        buffer = DeviceBuffer(self._device, self._geometry, self._format.dtype.itemsize, 1, prefix.prefix_length)
        resident = Resident(buffer, self._device.new_event())
        self._upload(prefix, buffer)
        with self._device.lock:
            self._device.uploads.record(resident.arrived)
        return resident

    def _upload(self, prefix: Prefix, buffer: DeviceBuffer) -> None:
        turn = 0
        for index, pair in enumerate(self._format.stored(prefix)):
            for part, array in enumerate(pair):
                address = buffer.address(index, part)
                flat = array.reshape(-1)
                step = _STAGING_BYTES // self._format.dtype.itemsize
                for first in range(0, flat.size, step):
                    self._stage(turn % 2, address + first * self._format.dtype.itemsize, flat[first : first + step])
                    turn += 1

    def _stage(self, place: int, address: int, numbers: np.ndarray) -> None:
        self._copied[place].wait()  # until what was in it is on the GPU
        staged = self._staging[place].view(self._format.dtype)[: numbers.size]
        np.copyto(staged, numbers, casting="same_kind")
        with self._device.lock:
            self._device.uploads.upload(address, staged)
            self._device.uploads.record(self._copied[place])
