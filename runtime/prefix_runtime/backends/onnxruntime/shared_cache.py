"""Key/value buffers that past and present share: how they are shaped, seeded with prefixes, and run with a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.cache.cache import Cache
from prefix_runtime.prefix.cache_format import CacheFormat
from prefix_runtime.prefix.geometry import Geometry
from prefix_runtime.prefix.prefix import Prefix

from .binding import Binding
from .session import Session


class SharedCache(Cache):
    """A cache for graphs of the fast flavour, whose inputs and outputs are bound to it.

    Past and present of a layer are one array, [rows, num_key_value_heads, capacity, head_dim]: a run appends to it in
    place, to each row as far as it is filled.
    The positions of a prefix are never written again, so a row is the same task's empty row as soon as its length is
    set back.

    Args:
        session: of the graph.
        geometry: the model's.
        rows: of the batch.
        capacity: positions of each row.
        cache_format: of the graph's past and present.
    """

    def __init__(
        self, session: Session, geometry: Geometry, rows: int, capacity: int, cache_format: CacheFormat
    ) -> None:
        self._format = cache_format
        self._layers = [
            tuple(
                np.empty((rows, layer.key_value_heads, capacity, layer.head_dim), cache_format.dtype)
                for _ in ("key", "value")
            )
            for layer in geometry.layers
        ]
        super().__init__(rows, capacity, sum(array.nbytes for layer in self._layers for array in layer))
        self._mask = np.zeros((rows, capacity), np.int64)
        self._vocab_size = geometry.vocab_size
        self._prompt, self._step = session.binding(), session.binding()
        self._prompt_row = self._step_rows = -1  # what is bound: nothing yet
        self._token_ids = np.zeros((rows, 1), np.int64)
        self._positions = np.zeros((rows, 1), np.int64)
        self._logits = np.empty((rows, 1, geometry.vocab_size), np.float32)

    def seed(self, row: int, prefix: Prefix | None) -> None:
        """See `Cache`: the prefix is copied into the first positions."""
        held = self.rows[row]
        held.prefix = None  # until the new one is whole
        if prefix is not None:
            for arrays, stored in zip(self._layers, self._format.stored(prefix), strict=True):
                for array, part in zip(arrays, stored, strict=True):
                    array[row, :, : prefix.prefix_length] = part
        held.prefix = prefix
        self.reset(row)

    def reset(self, row: int) -> None:
        """See `Cache`."""
        self._fill(row, self.rows[row].begin())

    def move(self, source: int, target: int) -> None:
        """See `Cache`."""
        self.fork(source, target, 0)

    def fork(self, source: int, target: int, start: int) -> None:
        """See `Cache`."""
        left, right = self.rows[source], self.rows[target]
        right.prefix = None  # until the copy is whole
        for layer in self._layers:
            for array in layer:
                array[target, :, start : left.length] = array[source, :, start : left.length]
        right.prefix, right.offset = left.prefix, left.offset
        self._fill(target, left.length)

    def prefill(self, row: int, token_ids: Sequence[int], keep_all_logits: bool = False) -> np.ndarray:
        """See `Cache`."""
        held, count = self.rows[row], len(token_ids)
        self._check_room(held, count)
        logits = np.empty((1, count, self._vocab_size), np.float32) if keep_all_logits else self._logits[row : row + 1]
        positions = np.arange(held.position, held.position + count, dtype=np.int64)
        binding = self._prompt
        if self._prompt_row != row:
            self._prompt_row = -1  # until all is bound
            self._bind_layers(self._prompt, slice(row, row + 1))
            self._prompt_row = row
        binding.input(contract.INPUT_IDS, np.asarray(token_ids, np.int64).reshape(1, count))
        binding.input(contract.POSITION_IDS, positions.reshape(1, count))
        binding.input(contract.ATTENTION_MASK, np.ones((1, held.length + count), np.int64))
        binding.input(contract.NUM_LOGITS_TO_KEEP, np.array(0 if keep_all_logits else 1, np.int64))
        binding.output(contract.LOGITS, logits)
        binding.run()
        self._fill(row, held.length + count)
        kept: np.ndarray = logits[0] if keep_all_logits else logits[0, 0]
        return kept

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Cache`."""
        count = len(token_ids)
        for row in range(count):
            held = self.rows[row]
            self._check_room(held, 1)
            self._mask[row, held.length] = 1
            self._token_ids[row, 0], self._positions[row, 0] = token_ids[row], held.position
        if self._step_rows != count:
            self._bind_step(count)
        self._step.run()
        for held in self.rows[:count]:
            held.length += 1
        logits: np.ndarray = self._logits[:count, 0]
        return logits

    def _bind_step(self, count: int) -> None:
        self._step_rows = -1  # until all is bound
        self._bind_layers(self._step, slice(count))
        self._step.input(contract.INPUT_IDS, self._token_ids[:count])
        self._step.input(contract.POSITION_IDS, self._positions[:count])
        # The mask keeps the buffer's whole length: its sum, not its size, tells the operator how far to read a row.
        self._step.input(contract.ATTENTION_MASK, self._mask[:count])
        self._step.input(contract.NUM_LOGITS_TO_KEEP, np.array(1, np.int64))
        self._step.output(contract.LOGITS, self._logits[:count])
        self._step_rows = count

    def _bind_layers(self, binding: Binding, rows: slice) -> None:
        for index, arrays in enumerate(self._layers):
            for part, array in zip(contract.PARTS, arrays, strict=True):
                binding.input(contract.tensor_name(contract.PAST, index, part), array[rows])
                binding.output(contract.tensor_name(contract.PRESENT, index, part), array[rows])

    def _fill(self, row: int, length: int) -> None:
        self.rows[row].length = length
        self._mask[row, :length] = 1
        self._mask[row, length:] = 0
