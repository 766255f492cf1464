"""Key/value buffers: how they are shaped, seeded with a prefix, reused and bounded in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .errors import ContextOverflowError
from .geometry import Geometry
from .prefix import Prefix
from .session import Binding, Session

# Buffers grow in steps, so that requests of about the same length find each other's buffers.
_CAPACITY_STEP = 64


class KeyValueCache:
    """One row's keys and values for every layer, and the graph's inputs and outputs bound to them.

    Past and present of a layer are one array, [1, num_key_value_heads, capacity, head_dim] float32: a run appends to it
    in place. The positions of the prefix are never written again, so the cache is the same task's empty cache as soon
    as its length is set back.

    Attributes:
        capacity: positions that there is room for.
        prefix: what the first positions hold.
        length: positions that are filled, the prefix's included.
        nbytes: of the keys and values.
        is_wanted: whether it is to be kept for another request.
    """

    def __init__(self, session: Session, geometry: Geometry, capacity: int) -> None:
        self.capacity = capacity
        self.prefix: Prefix | None = None
        self.length = 0
        self.is_wanted = True
        self._layers: list[tuple[np.ndarray, np.ndarray]] = []
        self._binding = session.binding()
        for index, layer in enumerate(geometry.layers):
            shape = (1, layer.key_value_heads, capacity, layer.head_dim)
            self._layers.append((np.empty(shape, np.float32), np.empty(shape, np.float32)))
            for part, array in zip(("key", "value"), self._layers[index], strict=True):
                self._binding.input(f"past_key_values.{index}.{part}", array)
                self._binding.output(f"present.{index}.{part}", array)
        self.nbytes = sum(key.nbytes + value.nbytes for key, value in self._layers)
        self._mask = np.zeros((1, capacity), np.int64)
        self._step = _StepArrays(geometry.vocab_size)
        self._step_is_bound = False

    def seed(self, prefix: Prefix | None) -> None:
        """Copy a prefix into the first positions, or none, and forget everything else."""
        self.prefix = None  # until the new one is whole
        if prefix is not None:
            for (key, value), layer in zip(self._layers, prefix.sites["decoder"], strict=True):
                key[0, :, : prefix.prefix_length] = layer.key
                value[0, :, : prefix.prefix_length] = layer.value
        self.prefix = prefix
        self.reset()

    def reset(self) -> None:
        """Forget all but the prefix."""
        self.length = 0 if self.prefix is None else self.prefix.prefix_length
        self._mask[:, self.length :] = 0
        self._mask[:, : self.length] = 1

    @property
    def position(self) -> int:
        """The position of the next token of text."""
        return (
            self.length if self.prefix is None else self.length - self.prefix.prefix_length + self.prefix.position_base
        )

    def extend(self, token_ids: np.ndarray, keep_all_logits: bool = False) -> np.ndarray:
        """Run the graph on tokens [sequence] int64 and append their keys and values.

        Returns the logits, float32: [vocab] of the last token, a view that the next call overwrites; or, when all
        are kept, a new array [sequence, vocab].
        """
        count = len(token_ids)
        if self.length + count > self.capacity:
            raise ContextOverflowError(f"expected at most {self.capacity} positions, found {self.length + count}")
        self._mask[:, self.length : self.length + count] = 1
        if count == 1 and not keep_all_logits:
            logits = self._run_step(int(token_ids[0]))
        else:
            logits = self._run_sequence(token_ids, keep_all_logits)
        self.length += count
        return logits

    def _run_step(self, token_id: int) -> np.ndarray:
        if not self._step_is_bound:
            self._step.bind(self._binding)
            # The mask keeps the buffer's whole length: its sum, not its size, tells the operator how far to read.
            self._binding.input("attention_mask", self._mask)
            self._step_is_bound = True
        self._step.token_id[0, 0] = token_id
        self._step.position[0, 0] = self.position
        self._binding.run()
        return self._step.last_logits

    def _run_sequence(self, token_ids: np.ndarray, keep_all_logits: bool) -> np.ndarray:
        count = len(token_ids)
        logits = np.empty((1, count, self._step.logits.shape[2]), np.float32) if keep_all_logits else self._step.logits
        positions = np.arange(self.position, self.position + count, dtype=np.int64)
        self._binding.input("input_ids", np.ascontiguousarray(token_ids, np.int64).reshape(1, count))
        self._binding.input("position_ids", positions.reshape(1, count))
        self._binding.input("attention_mask", np.ones((1, self.length + count), np.int64))
        self._binding.input("num_logits_to_keep", np.array(0 if keep_all_logits else 1, np.int64))
        self._binding.output("logits", logits)
        self._step_is_bound = False
        self._binding.run()
        kept: np.ndarray = logits[0]
        return kept if keep_all_logits else self._step.last_logits


class _StepArrays:
    """What a decode step reads and writes beside the keys and values: allocated once, bound once, changed in place."""

    def __init__(self, vocab_size: int) -> None:
        self.token_id = np.zeros((1, 1), np.int64)
        self.position = np.zeros((1, 1), np.int64)
        self.logits = np.empty((1, 1, vocab_size), np.float32)
        self.last_logits = self.logits.reshape(vocab_size)
        self._keep_last = np.array(1, np.int64)

    def bind(self, binding: Binding) -> None:
        binding.input("input_ids", self.token_id)
        binding.input("position_ids", self.position)
        binding.input("num_logits_to_keep", self._keep_last)
        binding.output("logits", self.logits)


class CachePool:
    """Caches that are lent to one request at a time and remember which prefix they hold.

    A task's next request finds the cache that already holds its prefix and copies nothing. Idle caches are dropped,
    the least recently used first, while all caches together take more than `budget` bytes; the caches of running
    requests are never dropped.
    """

    def __init__(self, session: Session, geometry: Geometry, max_length: int, budget: int) -> None:
        self._session, self._geometry = session, geometry
        self._max_length, self._budget = max_length, budget
        self._lock = threading.Lock()
        self._idle: list[KeyValueCache] = []  # the least recently used first
        self._lent: list[KeyValueCache] = []
        self._lent_bytes = 0  # with those that are being made

    @contextmanager
    def lease(self, prefix: Prefix | None, length: int) -> Iterator[KeyValueCache]:
        """A cache that holds `prefix` and nothing else, with room for `length` positions in all."""
        cache = self._take(prefix, self._capacity(length))
        try:
            if cache.prefix is not prefix:
                cache.seed(prefix)
            else:
                cache.reset()
            yield cache
        finally:
            self._give_back(cache)

    def forget(self, prefix: Prefix) -> None:
        """Drop the caches that hold a prefix, those of running requests as soon as they end."""
        with self._lock:
            self._idle = [cache for cache in self._idle if cache.prefix is not prefix]
            for cache in self._lent:
                cache.is_wanted = cache.is_wanted and cache.prefix is not prefix

    def _capacity(self, length: int) -> int:
        steps = -(-length // _CAPACITY_STEP)
        return max(length, min(steps * _CAPACITY_STEP, self._max_length))

    def _take(self, prefix: Prefix | None, capacity: int) -> KeyValueCache:
        with self._lock:
            cache = self._find(prefix, capacity)
            if cache is not None:
                self._idle.remove(cache)
                self._lent.append(cache)
                self._lent_bytes += cache.nbytes
                return cache
            needed = 4 * capacity * self._geometry.values_per_position
            self._lent_bytes += needed
            self._shrink()
        try:
            cache = KeyValueCache(self._session, self._geometry, capacity)
        except BaseException:
            with self._lock:
                self._lent_bytes -= needed
            raise
        with self._lock:
            self._lent.append(cache)
        return cache

    def _find(self, prefix: Prefix | None, capacity: int) -> KeyValueCache | None:
        fitting = [cache for cache in self._idle if cache.capacity >= capacity]
        seeded = [cache for cache in fitting if cache.prefix is prefix]
        if seeded:
            return seeded[-1]
        # When a new cache would go over the budget, the oldest that is large enough is seeded anew: this spares
        # the allocation. Otherwise a new one leaves the others' prefixes where they are.
        in_use = self._lent_bytes + sum(cache.nbytes for cache in self._idle)
        full = in_use + 4 * capacity * self._geometry.values_per_position > self._budget
        return fitting[0] if fitting and full else None

    def _give_back(self, cache: KeyValueCache) -> None:
        with self._lock:
            self._lent.remove(cache)
            self._lent_bytes -= cache.nbytes
            if cache.is_wanted:
                self._idle.append(cache)
            self._shrink()

    def _shrink(self) -> None:
        total = self._lent_bytes + sum(cache.nbytes for cache in self._idle)
        while self._idle and total > self._budget:
            total -= self._idle.pop(0).nbytes
