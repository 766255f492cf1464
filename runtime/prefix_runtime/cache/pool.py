"""Key/value buffers that are lent to requests, remember their prefixes, and are bounded in memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prefix_runtime.errors import BusyError, RequestError
from prefix_runtime.prefix.prefix import Prefix

from .cache import Cache

CAPACITY_STEP = 64
"""Positions by which buffers grow, so that requests of about the same length find each other's."""

CacheMaker = Callable[[int, int], Cache]
"""Rows and capacity to a cache."""


class _Lease:
    """A cache that a request has, or that is being made for it. Only the request refers to it.

    Attributes:
        cache: None until it is made, and after it was given back.
        nbytes: that it takes.
    """

    __slots__ = ("__weakref__", "cache", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.cache: Cache | None = None
        self.nbytes = nbytes


class CachePool:
    """Caches that are lent to one batch at a time and remember which prefixes they hold.

    A task's next request finds the cache that already holds its prefix and copies nothing. Idle caches are dropped,
    the least recently used first, while all caches together take more than `budget` bytes; the caches of running
    requests are never dropped.

    An interrupt may come at any moment, and a stream may be collected in a thread that holds the lock. So:

    1. The lock is taken by `with` alone, and only by those that take a cache.
    2. Giving back and forgetting take no lock: each is one operation of a list at a time.
    3. What is lent is not counted but looked up: a lease is in the books for as long as its request has it.
    4. A cache that a request left with an error is not used again.

    Args:
        make: makes a cache of so many rows and so many positions of each.
        position_bytes: that the keys and values of one position take.
        max_length: positions that a row may take.
        budget: bytes of keys and values, of all caches together.
        step: positions by which caches grow.
        limit: bytes that the caches of running requests may take together. Default: no limit.
    """

    def __init__(
        self,
        make: CacheMaker,
        position_bytes: int,
        max_length: int,
        budget: int,
        step: int = CAPACITY_STEP,
        *,
        limit: int | None = None,
    ) -> None:
        self._make, self._position_bytes, self._step = make, position_bytes, step
        self._max_length, self._budget, self._limit = max_length, budget, limit
        self._lock = threading.Lock()
        self._idle: list[Cache] = []  # the least recently used first
        self._leases: set[weakref.ref[_Lease]] = set()

    @contextmanager
    def lease(self, prefixes: Sequence[Prefix | None], length: int) -> Iterator[tuple[Cache, list[int]]]:
        """A cache whose first rows hold these prefixes and nothing else, and the row of each prefix.

        Args:
            prefixes: one for each row of the batch.
            length: positions that the longest row needs in all.

        Raises:
            BusyError: with it, running requests would take more than the limit.
            RequestError: it would take more than the limit alone.
        """
        lease = self._take(prefixes, self._capacity(length))
        assert lease.cache is not None
        try:
            yield lease.cache, _seeded(lease.cache, prefixes)
        except GeneratorExit:  # a stream that is left, between two runs
            self._give_back(lease)
            raise
        except BaseException:  # maybe in the middle of a run or a copy
            lease.cache, lease.nbytes = None, 0
            raise
        self._give_back(lease)

    def forget(self, prefix: Prefix) -> None:
        """Drop the caches that hold a prefix, those of running requests as soon as they end. Takes no lock."""
        # In this order, as one may be given back meanwhile.
        for lease in self._running():
            cache = lease.cache
            if cache is not None and _holds(cache, prefix):
                cache.is_wanted = False
        for cache in list(self._idle):
            if _holds(cache, prefix) and self._claimed(cache) and cache.let_go(prefix):
                self._idle.append(cache)

    @property
    def lent_bytes(self) -> int:
        """Bytes that the caches of running requests take, those that are being made among them."""
        return sum(lease.nbytes for lease in self._running())

    def _running(self) -> list[_Lease]:
        return [lease for reference in self._leases.copy() if (lease := reference()) is not None]

    def _capacity(self, length: int) -> int:
        steps = -(-length // self._step)
        return max(length, min(steps * self._step, self._max_length))

    def _take(self, prefixes: Sequence[Prefix | None], capacity: int) -> _Lease:
        needed = len(prefixes) * capacity * self._position_bytes
        with self._lock:
            cache = self._found(prefixes, capacity, needed)
            self._check_limit(needed if cache is None else cache.nbytes)
            lease = _Lease(needed if cache is None else cache.nbytes)
            self._leases.add(weakref.ref(lease, self._leases.discard))
        lease.cache = cache
        if cache is None:
            self._shrink()
            lease.cache = self._make(len(prefixes), capacity)
        return lease

    def _found(self, prefixes: Sequence[Prefix | None], capacity: int, needed: int) -> Cache | None:
        """An idle cache that suits, taken out of the idle ones."""
        while (cache := self._find(prefixes, capacity, needed)) is not None:
            if self._claimed(cache):  # else it was dropped meanwhile
                return cache
        return None

    def _find(self, prefixes: Sequence[Prefix | None], capacity: int, needed: int) -> Cache | None:
        idle = list(self._idle)
        fitting = [cache for cache in idle if cache.capacity >= capacity and _fits(cache, len(prefixes))]
        if not fitting:
            return None
        # The last one of those that hold most: the most recently used.
        best = max(reversed(fitting), key=lambda cache: _held(cache, prefixes))
        if _held(best, prefixes) == len(prefixes):
            return best
        # When a new cache would go over the budget, the oldest that is large enough is seeded anew: this spares
        # the allocation. Otherwise a new one leaves the others' prefixes where they are; but a batch's is too large for
        # one of each combination.
        if len(prefixes) > 1 or best.is_seeded_at_once:
            return best
        in_use = self.lent_bytes + sum(cache.nbytes for cache in idle)
        return fitting[0] if in_use + needed > self._budget else None

    def _claimed(self, cache: Cache) -> bool:
        """Take a cache out of the idle ones; returns whether it was there: one caller gets it."""
        try:
            self._idle.remove(cache)
        except ValueError:
            return False
        return True

    def _check_limit(self, nbytes: int) -> None:
        if self._limit is not None and nbytes > self._limit:
            raise RequestError(
                f"expected a request to take at most {self._limit} bytes of buffers, found one of {nbytes}; lower "
                "num_beams, max_batch or max_new_tokens, or raise max_cache_bytes"
            )
        if self._limit is not None and self.lent_bytes + nbytes > self._limit:
            raise BusyError(
                f"expected running requests to take at most {self._limit} bytes of buffers, found {self.lent_bytes} in "
                f"use and {nbytes} more to be taken; wait for a request to end, close a stream, or raise "
                "max_cache_bytes"
            )

    def _give_back(self, lease: _Lease) -> None:
        cache = lease.cache
        assert cache is not None
        lease.nbytes = 0
        if cache.is_wanted:
            self._idle.append(cache)
        lease.cache = None
        if not cache.is_wanted:  # a prefix was forgotten meanwhile
            self._claimed(cache)
        self._shrink()

    def _shrink(self) -> None:
        """Drop idle caches until all together keep to the budget. Takes no lock."""
        excess = self.lent_bytes + sum(cache.nbytes for cache in list(self._idle)) - self._budget
        while excess > 0:
            try:
                excess -= self._idle.pop(0).nbytes
            except IndexError:  # none is left
                return


def _fits(cache: Cache, rows: int) -> bool:
    """Whether a batch may run in a cache; a single request does not take a batch's, which is much larger."""
    return len(cache.rows) == rows or len(cache.rows) > rows > 1


def _holds(cache: Cache, prefix: Prefix) -> bool:
    return any(row.prefix is prefix for row in cache.rows)


def _held(cache: Cache, prefixes: Sequence[Prefix | None]) -> int:
    """How many of some prefixes the first rows hold."""
    if len(prefixes) == 1:  # asked of every idle cache, of which there may be thousands
        return cache.rows[0].prefix is prefixes[0]
    return len(_matches(cache, prefixes))


def _matches(cache: Cache, prefixes: Sequence[Prefix | None]) -> dict[int, int]:
    """For prefixes that one of the first rows holds, by their place: the row; each row once."""
    free = list(range(len(prefixes)))
    rows = {}
    for index, prefix in enumerate(prefixes):
        row = next((row for row in free if cache.rows[row].prefix is prefix), None)
        if row is not None:
            free.remove(row)
            rows[index] = row
    return rows


def _seeded(cache: Cache, prefixes: Sequence[Prefix | None]) -> list[int]:
    """Let the first rows hold these prefixes and nothing else; returns the row of each."""
    rows = _matches(cache, prefixes)
    for row in rows.values():
        cache.reset(row)
    free = (row for row in range(len(prefixes)) if row not in set(rows.values()))
    for index, prefix in enumerate(prefixes):
        if index not in rows:
            rows[index] = next(free)
            cache.seed(rows[index], prefix)
    return [rows[index] for index in range(len(prefixes))]
