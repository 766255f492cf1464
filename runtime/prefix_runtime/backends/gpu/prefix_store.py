"""Prefixes that lie on a GPU, from where a task's request copies its own; the least recently used are let go of."""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from prefix_runtime.prefix.cache_format import CacheFormat
from prefix_runtime.prefix.geometry import Geometry
from prefix_runtime.prefix.prefix import Prefix

from .buffer import DeviceBuffer

if TYPE_CHECKING:
    from .device import Device, Event

_PIECE_BYTES, _PIECES = 4 << 20, 6
"""Of page-locked memory that prefixes pass through. Of 2 MB 20 MB take 0.2 ms longer: handing one over takes time."""
_THREADS = min(6, os.cpu_count() or 1)
"""That fill it. 20 MB for an H200 take one 4.2 ms, two 2.8, three 2.6, four 2.4, six 2.2, eight as long."""


class PrefixStore:
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
        self._staging = _Staging(device, cache_format.dtype)

    def get(self, prefix: Prefix) -> DeviceBuffer:
        """Where a prefix lies on the GPU, one row of its length, for all that the engine's stream is asked from now on.

        Raises:
            ProviderError: the GPU has no room for it.
        """
        if (on_gpu := self._find(prefix)) is not None:
            return on_gpu
        with self._staging_lock:
            if (on_gpu := self._find(prefix)) is not None:  # another thread was faster
                return on_gpu
            buffer = self._brought_in(prefix)
            self._held[id(prefix)] = prefix, buffer
        return buffer

    def forget(self, prefix: Prefix) -> None:
        """Drop a prefix, if it is there. Takes no lock: a collected stream may call it in a thread that holds one."""
        self._held.pop(id(prefix), None)

    @property
    def nbytes(self) -> int:
        """Bytes that prefixes take."""
        return sum(buffer.nbytes for _, buffer in list(self._held.values()))

    def _find(self, prefix: Prefix) -> DeviceBuffer | None:
        with self._lock:
            if (entry := self._held.get(id(prefix))) is None:
                return None
            with suppress(KeyError):  # it is forgotten at this moment
                self._held.move_to_end(id(prefix))
            return entry[1]

    def _brought_in(self, prefix: Prefix) -> DeviceBuffer:
        needed = prefix.prefix_length * self._format.dtype.itemsize * self._geometry.values_per_position
        with self._lock:
            excess = self.nbytes + needed - self._budget
            with suppress(KeyError):  # none is left
                while excess > 0:
                    excess -= self._held.popitem(last=False)[1][1].nbytes
        uploads = self._device.uploads
        buffer = DeviceBuffer(
            self._device, self._geometry, self._format.dtype.itemsize, 1, prefix.prefix_length, first_user=uploads
        )
        self._staging.bring(
            (buffer.address(index, part), array.reshape(-1))
            for index, pair in enumerate(self._format.stored(prefix))
            for part, array in enumerate(pair)
        )
        with self._device.turn():
            self._device.await_uploads()
        return buffer


class _Staging:
    """Numbers on their way to a GPU, through page-locked memory: threads fill its pieces, which go one after another.

    Args:
        device: the GPU.
        dtype: of the numbers there.
    """

    def __init__(self, device: Device, dtype: np.dtype) -> None:
        self._device = device
        size = _PIECE_BYTES // dtype.itemsize
        self._pieces = [(device.pinned((size,), dtype), device.new_event()) for _ in range(_PIECES)]
        self._pool = _filling_threads()
        self._is_at_rest = True

    def bring(self, arrays: Iterable[tuple[int, np.ndarray]]) -> None:
        """Let the GPU copy flat arrays, each to its address."""
        if not self._is_at_rest:
            self._come_to_rest()
        self._is_at_rest = False
        under_way: deque[tuple[int, np.ndarray, Event, Future[int]]] = deque()
        pieces = itertools.cycle(self._pieces)
        for address, parts in _joined(arrays, self._pieces[0][0]):
            if len(under_way) == len(self._pieces):
                self._send(*under_way.popleft())
            staged, copied = next(pieces)
            copied.wait()  # what was in it is on the GPU
            under_way.append((address, staged, copied, self._pool.submit(_fill, staged, parts)))
        while under_way:
            self._send(*under_way.popleft())
        self._is_at_rest = True

    def _come_to_rest(self) -> None:
        """After a failure or an interrupt: wait for all threads that fill pieces and for all copies of these."""
        self._pool.shutdown()
        self._pool = _filling_threads()
        self._device.uploads.synchronize()

    def _send(self, address: int, staged: np.ndarray, copied: Event, filled: Future[int]) -> None:
        count = filled.result()
        with self._device.turn():
            self._device.uploads.upload(address, staged[:count])
            self._device.uploads.record(copied)


def _filling_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "prefix-runtime-staging")


def _joined(arrays: Iterable[tuple[int, np.ndarray]], staged: np.ndarray) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Flat arrays that go to addresses one behind the other, together, as much of them as a piece holds."""
    parts: list[np.ndarray] = []
    start = count = 0
    for address, numbers in arrays:
        first = 0
        while first < numbers.size:
            place = address + first * staged.itemsize
            if parts and (count == staged.size or place != start + count * staged.itemsize):
                yield start, parts
                parts, count = [], 0
            if not parts:
                start = place
            part = numbers[first : first + staged.size - count]
            parts.append(part)
            count, first = count + part.size, first + part.size
    if parts:
        yield start, parts


def _fill(staged: np.ndarray, parts: Iterable[np.ndarray]) -> int:
    """Copy arrays one behind the other; returns how many numbers these are."""
    count = 0
    for part in parts:
        np.copyto(staged[count : count + part.size], part, casting="same_kind")
        count += part.size
    return count
