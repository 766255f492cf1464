"""The bandwidth that memory is read at, the host's or a GPU's, which bounds how fast a decode step can be."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from prefix_runtime.machine import free_memory, usable_processors

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.device import Device

MOST_BYTES = 1 << 30
"""Of the array that is read: several times what most processors cache."""

_SHARE_OF_FREE_MEMORY = 4
_PASSES = 4
_COPIES = 8  # that one pass on a GPU asks for, so that asking costs little beside them


class Probe(Protocol):
    """Something that measures bandwidth again and again."""

    def measure(self) -> float:
        """Bytes a second."""


class BandwidthProbe:
    """Reads a large array again and again, each of `threads` threads its own slice; the array is freed with it.

    Args:
        threads: that read at once; None takes one a processor that this process may use.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or usable_processors()
        # Ones, not zeros: pages that were never written are all one page of zeros, which stays in the cache.
        self._slices = np.array_split(np.ones(_bytes_to_read() // 8, np.int64), self._threads)

    def measure(self) -> float:
        """Bytes a second: the best of a few passes, because whatever disturbs one can only make it slower."""
        with ThreadPoolExecutor(self._threads) as pool:
            return sum(part.nbytes for part in self._slices) / min(self._pass(pool) for _ in range(_PASSES))

    def _pass(self, pool: ThreadPoolExecutor) -> float:
        started = time.perf_counter()
        # A sum of int64 streams fastest of what numpy has, without the interpreter's lock: float32 sums are pairwise,
        # a dot product multiplies, a maximum compares; each read 10 to 20 % less on the same machine.
        list(pool.map(np.add.reduce, self._slices))
        return time.perf_counter() - started


class CopyProbe:
    """Copies a large piece of a GPU's memory to another, which reads it and writes it.

    Args:
        device: the GPU.

    Raises:
        ProviderError: it has no room for both.
    """

    def __init__(self, device: Device) -> None:
        self._stream = device.stream
        self._source, self._target = device.allocate(MOST_BYTES), device.allocate(MOST_BYTES)

    def measure(self) -> float:
        """Bytes that are read and written a second: the best of a few passes."""
        return 2 * _COPIES * self._source.nbytes / min(self._pass() for _ in range(_PASSES))

    def _pass(self) -> float:
        self._stream.synchronize()
        started = time.perf_counter()
        for _ in range(_COPIES):
            self._stream.copy(self._target.address, self._source.address, self._source.nbytes)
        self._stream.synchronize()
        return time.perf_counter() - started


def _bytes_to_read() -> int:
    free = free_memory()
    return MOST_BYTES if free is None else max(1 << 20, min(MOST_BYTES, free // _SHARE_OF_FREE_MEMORY))
