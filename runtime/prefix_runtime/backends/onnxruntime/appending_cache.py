"""Keys and values that every run returns longer: for graphs of the portable flavour, in standard operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.cache.cache import Cache
from prefix_runtime.errors import PrefixMismatchError
from prefix_runtime.prefix.cache_format import CacheFormat
from prefix_runtime.prefix.geometry import Geometry
from prefix_runtime.prefix.prefix import Prefix

from .session import Session

_Layers = list[tuple[np.ndarray, np.ndarray]]


class AppendingCache(Cache):
    """A cache for graphs that return past and new tokens as their present.

    A prompt is run in its row alone. For decode steps the rows are padded on the left to one length, which the mask
    leaves out, and run together; from then on they are one array for each layer.

    Args:
        session: of the graph.
        geometry: the model's.
        rows: of the batch.
        capacity: positions of each row, the prefix's included where it is fed.
        cache_format: of the graph's past and present.
        task_id: the place of a prefix in a graph that holds them; None where the graph holds none and a prefix is the
            initial past.
    """

    def __init__(
        self,
        session: Session,
        geometry: Geometry,
        rows: int,
        capacity: int,
        *,
        cache_format: CacheFormat,
        task_id: Callable[[Prefix], int] | None = None,
    ) -> None:
        super().__init__(rows, capacity, cache_format.dtype.itemsize * rows * capacity * geometry.values_per_position)
        self._session, self._geometry, self._format, self._task_id = session, geometry, cache_format, task_id
        self._binding = session.binding()
        groups = (contract.tensor_names(group, len(geometry.layers)) for group in (contract.PAST, contract.PRESENT))
        self._names = [tuple(zip(*pairs, strict=True)) for pairs in zip(*groups, strict=True)]
        """For each layer the names of its past and present keys, and of its past and present values."""
        self._alone: list[_Layers] = [self._empty() for _ in range(rows)]
        """Each row's own keys and values, [1, num_key_value_heads, length, head_dim], as long as it is not joined."""
        self._joined: _Layers | None = None
        self._mask = np.zeros((0, 0), np.int64)  # of the joined rows
        self._task_ids = np.zeros(rows, np.int64)

    def seed(self, row: int, prefix: Prefix | None) -> None:
        """See `Cache`."""
        held = self.rows[row]
        held.prefix = None  # until the new one is known to fit
        if prefix is not None and self._task_id is not None:
            self._task_ids[row] = self._task_id(prefix)
        elif prefix is not None and prefix.position_base != prefix.prefix_length:
            self._check_positions(prefix)
        held.prefix = prefix
        self.reset(row)

    def _check_positions(self, prefix: Prefix) -> None:
        if contract.POSITION_IDS not in self._session.inputs:
            raise PrefixMismatchError(
                "expected a prefix behind which text begins, as the graph counts positions itself, found one "
                f"whose text begins at {prefix.position_base}"
            )

    def reset(self, row: int) -> None:
        """See `Cache`."""
        self._part()
        held = self.rows[row]
        self._alone[row] = self._empty()
        held.length = held.offset = 0
        if held.prefix is not None and self._task_id is None:
            self._alone[row] = [(key[None], value[None]) for key, value in self._format.stored(held.prefix)]
            held.begin()

    def move(self, source: int, target: int) -> None:
        """See `Cache`."""
        self._part()
        self._alone[target] = self._alone[source]
        self._take_over(source, target)

    def fork(self, source: int, target: int, start: int) -> None:
        """See `Cache`: rows that are joined stay so; of rows alone both read the same arrays."""
        if self._joined is None or max(source, target) >= len(self._mask):
            self.move(source, target)
            return
        left, right = self.rows[source], self.rows[target]
        width = self._mask.shape[1]
        first = width - left.length + start if left.length == right.length else 0
        for pair in self._joined:
            for array in pair:
                array[target, :, first:] = array[source, :, first:]
        self._mask[target] = self._mask[source]
        self._take_over(source, target)

    def _take_over(self, source: int, target: int) -> None:
        """Let a row be described as another is."""
        self.rows[target].copy_from(self.rows[source])
        self._task_ids[target] = self._task_ids[source]

    def prefill(self, row: int, token_ids: Sequence[int], keep_all_logits: bool = False) -> np.ndarray:
        """See `Cache`."""
        self._part()
        held, count = self.rows[row], len(token_ids)
        self._check_room(held, count)
        mask = np.ones((1, held.length + count), np.int64)
        ids = np.asarray(token_ids, np.int64).reshape(1, count)
        logits, self._alone[row] = self._run(ids, [row], self._alone[row], mask, keep_all_logits)
        held.length += count
        kept: np.ndarray = logits[0] if keep_all_logits else logits[0, -1]
        return kept

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Cache`."""
        count = len(token_ids)
        for held in self.rows[:count]:
            self._check_room(held, 1)
        if self._joined is None or len(self._mask) != count:
            self._join(count)
        assert self._joined is not None
        self._mask = np.concatenate([self._mask, np.ones((count, 1), np.int64)], 1)
        ids = np.asarray(token_ids, np.int64).reshape(count, 1)
        logits, self._joined = self._run(ids, range(count), self._joined, self._mask, False)
        for held in self.rows[:count]:
            held.length += 1
        kept: np.ndarray = logits[:, -1]
        return kept

    def _run(
        self, token_ids: np.ndarray, rows: Sequence[int], past: _Layers, mask: np.ndarray, keep_all_logits: bool
    ) -> tuple[np.ndarray, _Layers]:
        """The logits [rows, kept, vocab] of new tokens [rows, sequence], and past and new keys and values."""
        count, sequence = token_ids.shape
        binding, wanted = self._binding, self._session.inputs
        is_choosing = contract.NUM_LOGITS_TO_KEEP in wanted
        binding.input(contract.INPUT_IDS, token_ids)
        binding.input(contract.ATTENTION_MASK, mask)
        if contract.POSITION_IDS in wanted:
            starts = np.array([[self.rows[row].position] for row in rows], np.int64)
            binding.input(contract.POSITION_IDS, starts + np.arange(sequence, dtype=np.int64))
        if is_choosing:
            binding.input(contract.NUM_LOGITS_TO_KEEP, np.array(0 if keep_all_logits else 1, np.int64))
        if contract.TASK_ID in wanted:
            binding.input(contract.TASK_ID, self._task_ids[list(rows)])
        present: _Layers = []
        for layer, pair, names in zip(self._geometry.layers, past, self._names, strict=True):
            shape = (count, layer.key_value_heads, mask.shape[1], layer.head_dim)
            present.append((np.empty(shape, self._format.dtype), np.empty(shape, self._format.dtype)))
            for (given, returned), before, after in zip(names, pair, present[-1], strict=True):
                binding.input(given, np.ascontiguousarray(before, self._format.dtype))
                binding.output(returned, after)
        kept = 1 if is_choosing and not keep_all_logits else sequence
        logits = np.empty((count, kept, self._geometry.vocab_size), np.float32)
        binding.output(contract.LOGITS, logits)
        binding.run()
        return logits, present

    def _empty(self) -> _Layers:
        shapes = [(1, layer.key_value_heads, 0, layer.head_dim) for layer in self._geometry.layers]
        return [(np.empty(shape, self._format.dtype), np.empty(shape, self._format.dtype)) for shape in shapes]

    def _join(self, count: int) -> None:
        """Make one array of the first rows, the shorter ones padded on the left."""
        self._part()
        longest = max(held.length for held in self.rows[:count])
        self._mask = np.zeros((count, longest), np.int64)
        for row, held in enumerate(self.rows[:count]):
            self._mask[row, longest - held.length :] = 1
        self._joined = [
            (self._padded(index, 0, count, longest), self._padded(index, 1, count, longest))
            for index in range(len(self._geometry.layers))
        ]

    def _padded(self, layer: int, part: int, count: int, length: int) -> np.ndarray:
        if count == 1:
            return self._alone[0][layer][part]
        _, heads, _, head_dim = self._alone[0][layer][part].shape
        joined = np.zeros((count, heads, length, head_dim), self._format.dtype)
        for row in range(count):
            own = self._alone[row][layer][part]
            joined[row, :, length - own.shape[2] :] = own[0]
        return joined

    def _part(self) -> None:
        """Give the joined rows back their own."""
        if self._joined is None:
            return
        length = self._mask.shape[1]
        for row, held in enumerate(self.rows[: len(self._mask)]):
            self._alone[row] = [
                (key[row : row + 1, :, length - held.length :], value[row : row + 1, :, length - held.length :])
                for key, value in self._joined
            ]
        self._joined = None
