"""Key/value buffers that are lent to requests, remember their prefixes, and are bounded in memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .cache import Cache
from .prefix import Prefix

CAPACITY_STEP = 64
"""Positions by which buffers grow, so that requests of about the same length find each other's."""

CacheMaker = Callable[[int, int], Cache]
"""Rows and capacity to a cache."""


class CachePool:
    """Caches that are lent to one batch at a time and remember which prefixes they hold.

    A task's next request finds the cache that already holds its prefix and copies nothing. Idle caches are dropped,
    the least recently used first, while all caches together take more than `budget` bytes; the caches of running
    requests are never dropped.

    Args:
        make: makes a cache of so many rows and so many positions of each.
        position_bytes: that the keys and values of one position take.
        max_length: positions that a row may take.
        budget: bytes of keys and values, of all caches together.
        step: positions by which caches grow.
    """

    def __init__(
        self, make: CacheMaker, position_bytes: int, max_length: int, budget: int, step: int = CAPACITY_STEP
    ) -> None:
        self._make, self._position_bytes, self._step = make, position_bytes, step
        self._max_length, self._budget = max_length, budget
        self._lock = threading.Lock()
        self._idle: list[Cache] = []  # the least recently used first
        self._lent: list[Cache] = []
        self._returned: deque[Cache] = deque()  # by their requests, and not taken in yet
        self._lent_bytes = 0  # with those that are being made

    @contextmanager
    def lease(self, prefixes: Sequence[Prefix | None], length: int) -> Iterator[tuple[Cache, list[int]]]:
        """A cache whose first rows hold these prefixes and nothing else, and the row of each prefix.

        Args:
            prefixes: one for each row of the batch.
            length: positions that the longest row needs in all.
        """
        cache = self._take(prefixes, self._capacity(length))
        try:
            yield cache, _seeded(cache, prefixes)
        finally:
            self._give_back(cache)

    def forget(self, prefix: Prefix) -> None:
        """Drop the caches that hold a prefix, those of running requests as soon as they end."""
        with self._lock:
            self._settle()
            self._idle = [cache for cache in self._idle if not _holds(cache, prefix) or cache.let_go(prefix)]
            for cache in self._lent:
                cache.is_wanted = cache.is_wanted and not _holds(cache, prefix)

    def _capacity(self, length: int) -> int:
        steps = -(-length // self._step)
        return max(length, min(steps * self._step, self._max_length))

    def _take(self, prefixes: Sequence[Prefix | None], capacity: int) -> Cache:
        needed = len(prefixes) * capacity * self._position_bytes
        with self._lock:
            self._settle()
            cache = self._find(prefixes, capacity, needed)
            if cache is not None:
                self._idle.remove(cache)
                self._lent.append(cache)
                self._lent_bytes += cache.nbytes
                return cache
            self._lent_bytes += needed
            self._shrink()
        try:
            cache = self._make(len(prefixes), capacity)
        except BaseException:
            with self._lock:
                self._lent_bytes -= needed
            raise
        with self._lock:
            self._lent.append(cache)
        return cache

    def _find(self, prefixes: Sequence[Prefix | None], capacity: int, needed: int) -> Cache | None:
        fitting = [cache for cache in self._idle if cache.capacity >= capacity and _fits(cache, len(prefixes))]
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
        in_use = self._lent_bytes + sum(cache.nbytes for cache in self._idle)
        return fitting[0] if in_use + needed > self._budget else None

    def _give_back(self, cache: Cache) -> None:
        # Without waiting for the lock: a stream that nobody reads on may be collected in this very thread while it is
        # held, and would wait for itself. Who holds it next settles.
        self._returned.append(cache)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Take in what was given back; with the lock held."""
        while self._returned:
            cache = self._returned.popleft()
            self._lent.remove(cache)
            self._lent_bytes -= cache.nbytes
            if cache.is_wanted:
                self._idle.append(cache)
            self._shrink()

    def _shrink(self) -> None:
        total = self._lent_bytes + sum(cache.nbytes for cache in self._idle)
        while self._idle and total > self._budget:
            total -= self._idle.pop(0).nbytes


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
    found = {}
    for index, prefix in enumerate(prefixes):
        row = next((row for row in free if cache.rows[row].prefix is prefix), None)
        if row is not None:
            free.remove(row)
            found[index] = row
    return found


def _seeded(cache: Cache, prefixes: Sequence[Prefix | None]) -> list[int]:
    """Let the first rows hold these prefixes and nothing else; returns the row of each."""
    found = _matches(cache, prefixes)
    for row in found.values():
        cache.reset(row)
    free = (row for row in range(len(prefixes)) if row not in set(found.values()))
    for index, prefix in enumerate(prefixes):
        if index not in found:
            found[index] = next(free)
            cache.seed(found[index], prefix)
    return [found[index] for index in range(len(prefixes))]
