"""Measure the read bandwidth of memory, the host's or a GPU's, which limits the speed of a decode step."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from prefix_runtime.machine import free_memory, usable_processors

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.device import Device

MOST_BYTES = 1 << 30
"""Size of the array: several times the cache of most processors."""

_SHARE_OF_FREE_MEMORY = 4
_PASSES = 4
_COPIES = 8  # copies in one pass on a GPU, so that the calls take little of the time


class Probe(Protocol):
    """Measures bandwidth, any number of times."""

    def measure(self) -> float:
        """The bandwidth in bytes per second."""


class BandwidthProbe:
    """Reads a large array in host memory; each thread reads its own slice.

    Args:
        threads: threads that read at once; None takes one for each processor that this process may use.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or usable_processors()
        # Ones, not zeros: the system maps all unwritten pages to one page of zeros, which stays in the cache.
        self._slices = np.array_split(np.ones(_bytes_to_read() // 8, np.int64), self._threads)

    def measure(self) -> float:
        """The bandwidth in bytes per second: the best of a few passes, because disturbances only slow a pass down."""
        with ThreadPoolExecutor(self._threads) as pool:
            return sum(part.nbytes for part in self._slices) / min(self._pass(pool) for _ in range(_PASSES))

    def _pass(self, pool: ThreadPoolExecutor) -> float:
        started = time.perf_counter()
        # A sum of int64 streams fastest in numpy, and releases the interpreter's lock. float32 sums (pairwise), dot
        # products and maxima each read 10 to 20 % less per second on the same machine.
        list(pool.map(np.add.reduce, self._slices))
        return time.perf_counter() - started


class CopyProbe:
    """Copies a large piece of a GPU's memory to another, which reads and writes.

    Args:
        device: the GPU.

    Raises:
        ProviderError: the GPU does not have enough free memory.
    """

    def __init__(self, device: Device) -> None:
        self._stream = device.stream
        self._source, self._target = device.allocate(MOST_BYTES), device.allocate(MOST_BYTES)

    def measure(self) -> float:
        """The bandwidth in bytes read and written per second: the best of a few passes."""
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
