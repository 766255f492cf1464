"""Prefixes that lie on a GPU, from where a task's request copies its own; the least recently used are let go of."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from .cache_format import CacheFormat
from .device_buffer import DeviceBuffer
from .geometry import Geometry
from .prefix import Prefix

if TYPE_CHECKING:
    from .device import Device

_STAGING_BYTES = 4 << 20
"""Of page-locked memory that a part of a prefix passes through, in turns of two: one is filled, the other copied."""
_THREADS = min(3, os.cpu_count() or 1)
"""That fill it. 20 MB for an H100 take one 4.0 ms, two 2.9, three 2.6; beside an H200 four took longer than one."""


class ResidentPrefixes:
    """The prefixes that lie on a GPU, at most so many bytes of them; safe to use from many threads.

    A prefix is brought in when it is first asked for, on a stream of its own: what else runs goes on while the host has
    pieces of it to give; what is asked of the engine's stream from then on waits, on the GPU, for the last of them.

    Args:
        device: the GPU.
        geometry: the model's.
        cache_format: what keys and values are kept in.
        budget: bytes; the prefix that was asked for last stays, whatever it takes.
    """

    def __init__(self, device: Device, geometry: Geometry, cache_format: CacheFormat, budget: int) -> None:
        self._device, self._geometry, self._format, self._budget = device, geometry, cache_format, budget
        self._lock, self._staging_lock = threading.Lock(), threading.Lock()
        # By identity: equality reads all numbers.
        self._held: OrderedDict[int, tuple[Prefix, DeviceBuffer]] = OrderedDict()
        self._bytes = 0
        self._staging = [_Staging(device, cache_format.dtype) for _ in range(_THREADS)]
        self._pool = ThreadPoolExecutor(_THREADS, "prefix-runtime-staging")

    def get(self, prefix: Prefix) -> DeviceBuffer:
        """Where a prefix lies on the GPU, one row of its length, for all that the engine's stream is asked from now on.

        Raises:
            ProviderError: the GPU has no room for it.
        """
        if (found := self._find(prefix)) is not None:
            return found
        with self._staging_lock:
            if (found := self._find(prefix)) is not None:  # another thread was faster
                return found
            buffer = self._brought_in(prefix)
            with self._lock:
                self._held[id(prefix)] = prefix, buffer
                self._bytes += buffer.nbytes
        return buffer

    def forget(self, prefix: Prefix) -> None:
        """Let go of a prefix, if it is there."""
        with self._lock:
            self._drop(id(prefix))

    @property
    def nbytes(self) -> int:
        """Bytes that prefixes take."""
        with self._lock:
            return self._bytes

    def _find(self, prefix: Prefix) -> DeviceBuffer | None:
        with self._lock:
            if (found := self._held.get(id(prefix))) is None:
                return None
            self._held.move_to_end(id(prefix))
            return found[1]

    def _drop(self, key: int) -> None:
        if (found := self._held.pop(key, None)) is not None:
            self._bytes -= found[1].nbytes

    def _brought_in(self, prefix: Prefix) -> DeviceBuffer:
        needed = prefix.prefix_length * self._format.dtype.itemsize * self._geometry.values_per_position
        with self._lock:
            while self._held and self._bytes + needed > self._budget:
                self._drop(next(iter(self._held)))
        uploads = self._device.uploads
        buffer = DeviceBuffer(
            self._device, self._geometry, self._format.dtype.itemsize, 1, prefix.prefix_length, first_user=uploads
        )
        pieces = [
            (buffer.address(index, part), array.reshape(-1))
            for index, pair in enumerate(self._format.stored(prefix))
            for part, array in enumerate(pair)
        ]
        share = -(-len(pieces) // _THREADS)
        shares = [pieces[first : first + share] for first in range(0, len(pieces), share)]
        for _ in self._pool.map(_Staging.bring, self._staging, shares):
            pass
        with self._device.turn():
            self._device.await_uploads()
        return buffer


class _Staging:
    """Numbers on their way to a GPU, through page-locked memory: what lies in one piece there goes in one.

    Args:
        device: the GPU.
        dtype: of the numbers there.
    """

    def __init__(self, device: Device, dtype: np.dtype) -> None:
        self._device = device
        size = _STAGING_BYTES // dtype.itemsize
        self._parts = [(device.pinned((size,), dtype), device.new_event()) for _ in range(2)]
        self._turn = self._filled = self._address = 0

    def bring(self, pieces: Sequence[tuple[int, np.ndarray]]) -> None:
        """Let the GPU copy flat arrays, each to its address."""
        self._filled = 0  # what a failure left has no place any more
        for address, numbers in pieces:
            self._write(address, numbers)
        self._flush()

    def _write(self, address: int, numbers: np.ndarray) -> None:
        while numbers.size:
            staged, copied = self._parts[self._turn]
            if self._filled in (0, staged.size) or address != self._address + self._filled * staged.itemsize:
                self._flush()
                self._address = address
                staged, copied = self._parts[self._turn]
                copied.wait()  # what was in it is on the GPU
            count = min(numbers.size, staged.size - self._filled)
            np.copyto(staged[self._filled : self._filled + count], numbers[:count], casting="same_kind")
            self._filled += count
            address, numbers = address + count * staged.itemsize, numbers[count:]

    def _flush(self) -> None:
        if not self._filled:
            return
        staged, copied = self._parts[self._turn]
        with self._device.turn():
            self._device.uploads.upload(self._address, staged[: self._filled])
            self._device.uploads.record(copied)
        self._turn, self._filled = 1 - self._turn, 0
