"""Keys and values on a GPU that every run of a TensorRT engine returns longer, beside those that it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prefix_runtime.backends.gpu.packed_layers import PackedLayers
from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.cache.cache import Cache, Row
from prefix_runtime.errors import ContextOverflowError, RequestError
from prefix_runtime.prefix.cache_format import CacheFormat
from prefix_runtime.prefix.geometry import Geometry
from prefix_runtime.prefix.prefix import Prefix

from .profile import DECODE, PREFILL
from .session import TensorRTEngineSession

_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)
_SMALL = (contract.INPUT_IDS, contract.POSITION_IDS, contract.ATTENTION_MASK, contract.TASK_ID)
"""The inputs that come from the host, in the order that `_Inputs.put` takes them."""


class TensorRTCache(Cache):
    """A cache for engines of portable graphs: a run reads one piece of the GPU's memory and writes another.

    A prompt is run in its row alone. For decode steps the rows are padded on the left to one length, which the mask
    leaves out, and run together, between two pieces of memory in turn. What comes and goes from the host are tokens,
    positions, masks and logits; a prefix stays on the GPU as long as its row holds it.

    Args:
        session: of the engine.
        geometry: the model's.
        rows: of the batch.
        capacity: positions of each row, the prefix's included where it is fed.
        cache_format: of the engine's past and present.
        task_id: the place of a prefix in an engine that holds them; None where a prefix is the initial past.

    Raises:
        RequestError: more rows than the engine was built for.
        ProviderError: the GPU has no room.
    """

    def __init__(
        self,
        session: TensorRTEngineSession,
        geometry: Geometry,
        rows: int,
        capacity: int,
        *,
        cache_format: CacheFormat,
        task_id: Callable[[Prefix], int] | None = None,
    ) -> None:
        if rows > session.limits.batch:
            raise RequestError(
                f"expected at most {session.limits.batch} rows, for which the engine was built, found {rows}; lower "
                "max_batch, or build it with --max-batch"
            )
        super().__init__(rows, capacity, cache_format.dtype.itemsize * rows * capacity * geometry.values_per_position)
        self._session, self._geometry, self._format, self._task_id = session, geometry, cache_format, task_id
        self._device = session.device
        self._nothing = self._new(1, 1)
        self._prefixes: list[tuple[Prefix | None, PackedLayers]] = [(None, self._nothing)] * rows
        self._own = [self._new(1, capacity) for _ in range(rows)]
        self._alone = [self._nothing] * rows
        """Of each row that is not joined: its prefix' or its own."""
        self._pair = (self._new(rows, capacity), self._new(rows, capacity))
        self._joined: PackedLayers | None = None
        self._mask = np.zeros((0, 0), np.int64)  # of the joined rows
        self._task_ids = np.zeros(rows, np.int64)
        self._inputs = _Inputs(session, rows, capacity)
        self._logits = self._device.allocate(rows * geometry.vocab_size * _FLOAT32.itemsize)
        self._host_logits = self._device.pinned((rows, geometry.vocab_size), _FLOAT32)

    def seed(self, row: int, prefix: Prefix | None) -> None:
        """See `Cache`."""
        held = self.rows[row]
        held.prefix, held.offset = prefix, 0
        if prefix is not None:
            if self._task_id is not None:
                self._task_ids[row] = self._task_id(prefix)
            else:
                held.offset = prefix.position_base - prefix.prefix_length
        self.reset(row)

    def reset(self, row: int) -> None:
        """See `Cache`: its prefix lies on the GPU already, unless it is new."""
        self._part()
        held = self.rows[row]
        self._alone[row], held.length = self._nothing, 0
        if held.prefix is not None and self._task_id is None:
            self._alone[row] = self._prefix(row, held.prefix)
            held.length = held.prefix.prefix_length

    def move(self, source: int, target: int) -> None:
        """See `Cache`."""
        self._part()
        self._own[source], self._own[target] = self._own[target], self._own[source]
        self._prefixes[source], self._prefixes[target] = self._prefixes[target], self._prefixes[source]
        self._alone[source], self._alone[target] = self._nothing, self._alone[source]
        left, right = self.rows[source], self.rows[target]
        right.copy_from(left)
        left.prefix, left.length, left.offset = None, 0, 0
        self._task_ids[target] = self._task_ids[source]

    def fork(self, source: int, target: int, start: int) -> None:
        """See `Cache`."""
        left, right = self.rows[source], self.rows[target]
        if self._joined is None or max(source, target) >= len(self._mask):
            self._part()
            own = self._own[target]
            own.rows, own.length = 1, left.length
            with self._device.turn():
                own.copy_row(0, self._alone[source], 0, left.length)
            self._alone[target] = own
        else:
            count = left.length - start if left.length == right.length else self._mask.shape[1]
            with self._device.turn():
                self._joined.copy_row(target, self._joined, source, count)
            self._mask[target] = self._mask[source]
        self._prefixes[target] = self._prefixes[source]
        right.copy_from(left)
        self._task_ids[target] = self._task_ids[source]

    def prefill(self, row: int, token_ids: Sequence[int], keep_all_logits: bool = False) -> np.ndarray:
        """See `Cache`."""
        self._part()
        held, count = self.rows[row], len(token_ids)
        self._check_room(held, count)
        self._check_prompt(held, count)
        past = self._alone[row]
        present = self._own[row] if past is not self._own[row] else self._new(1, self.capacity)
        mask = np.ones((1, held.length + count), np.int64)
        ids = np.array([token_ids], np.int64)
        logits = self._run(PREFILL, [row], ids, past=past, present=present, mask=mask, keep_all_logits=keep_all_logits)
        self._own[row] = self._alone[row] = present
        held.length += count
        chosen_logits: np.ndarray = logits[0] if keep_all_logits else logits[0, -1]
        return chosen_logits

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Cache`."""
        count = len(token_ids)
        for held in self.rows[:count]:
            self._check_room(held, 1)
        if self._joined is None or len(self._mask) != count:
            self._join(count)
        assert self._joined is not None
        if self._mask.shape[1] + 1 > self._session.limits.length:
            raise ContextOverflowError(
                f"expected at most {self._session.limits.length} positions, for which the engine was built, found "
                f"{self._mask.shape[1] + 1}"
            )
        self._mask = np.concatenate([self._mask, np.ones((count, 1), np.int64)], 1)
        past, present = self._joined, self._pair[self._joined is self._pair[0]]
        ids = np.array(token_ids, np.int64).reshape(count, 1)
        logits = self._run(DECODE, range(count), ids, past=past, present=present, mask=self._mask)
        self._joined = present
        for held in self.rows[:count]:
            held.length += 1
        last_logits: np.ndarray = logits[:, -1]
        return last_logits

    def _check_prompt(self, held: Row, count: int) -> None:
        limits = self._session.limits
        if count > limits.prompt:
            raise ContextOverflowError(
                f"expected a prompt of at most {limits.prompt} tokens, for which the engine was built, found {count}; "
                "shorten it, or build the engine with --max-prompt"
            )
        if held.length > limits.prefix:
            raise ContextOverflowError(
                f"expected at most {limits.prefix} positions before a prompt, for which the engine was built, found "
                f"{held.length}; build it with --max-prefix"
            )

    def _run(
        self,
        place: int,
        rows: Sequence[int],
        token_ids: np.ndarray,
        *,
        past: PackedLayers,
        present: PackedLayers,
        mask: np.ndarray,
        keep_all_logits: bool = False,
    ) -> np.ndarray:
        """The logits [rows, kept, vocab] of new tokens [rows, sequence], whose keys and values go behind the past's."""
        count, sequence = token_ids.shape
        present.rows, present.length = count, mask.shape[1]
        kept, vocab = (sequence if keep_all_logits else 1), self._geometry.vocab_size
        host_logits, logits = self._host_logits[:count, None], self._logits
        if keep_all_logits:
            host_logits = self._device.pinned((count, kept, vocab), _FLOAT32)
            logits = self._device.allocate(host_logits.nbytes)
        starts = np.array([[self.rows[row].position] for row in rows], np.int64)
        positions = starts + np.arange(sequence, dtype=np.int64)
        stream, device = self._device.stream, self._device
        with device.turn():
            bound = self._inputs.put(token_ids, positions, mask, self._task_ids[list(rows)])
            bound |= dict(past.tensors(contract.PAST)) | dict(present.tensors(contract.PRESENT))
            bound[contract.LOGITS] = (logits.address, (count, kept, vocab))
            self._session.run(place, bound, kept)
            stream.download(host_logits, logits.address)
        stream.synchronize()
        return host_logits

    def _prefix(self, row: int, prefix: Prefix) -> PackedLayers:
        """A prefix' keys and values on the GPU, where the row had brought it there before, or has it now."""
        before, layers = self._prefixes[row]
        if before is not prefix:
            layers = self._new(1, prefix.prefix_length)
            with self._device.turn():
                layers.upload(self._format.stored(prefix), self._format.dtype)
                self._device.stream.synchronize()  # the host's arrays may go
            self._prefixes[row] = (prefix, layers)
        return layers

    def _join(self, count: int) -> None:
        """Let the first rows lie together, the shorter ones padded on the left; one row stays where it is."""
        self._part()
        lengths = [held.length for held in self.rows[:count]]
        longest = max(lengths)
        self._mask = (np.arange(longest) >= longest - np.array(lengths)[:, None]).astype(np.int64)
        if count == 1:
            self._joined = self._alone[0]
            return
        joined = self._pair[0]
        joined.rows, joined.length = count, longest
        with self._device.turn():
            if min(lengths) < longest:
                joined.clear()  # what is masked must be numbers all the same
                self._device.stream.synchronize()
            for row, length in enumerate(lengths):
                joined.copy_row(row, self._alone[row], 0, length)
        self._joined = joined

    def _part(self) -> None:
        """Give the joined rows back their own."""
        joined, self._joined = self._joined, None
        if joined is None or joined is self._alone[0]:
            return
        with self._device.turn():
            for row, held in enumerate(self.rows[: len(self._mask)]):
                own = self._own[row]
                own.rows, own.length = 1, held.length
                own.copy_row(0, joined, row, held.length)
                self._alone[row] = own

    def _new(self, rows: int, capacity: int) -> PackedLayers:
        return PackedLayers(self._device, self._geometry, self._format.dtype.itemsize, rows, capacity)


class _Inputs:
    """The small inputs of a run, on the host and on the GPU.

    Args:
        session: of the engine.
        rows: of the batch.
        capacity: positions of each row.
    """

    def __init__(self, session: TensorRTEngineSession, rows: int, capacity: int) -> None:
        self._device, self._wanted = session.device, session.inputs
        tokens = max(rows, capacity)
        sizes = dict(zip(_SMALL, (tokens, tokens, rows * capacity, rows), strict=True))
        self._host = {name: self._device.pinned((size,), _INT64) for name, size in sizes.items()}
        self._there = {name: self._device.allocate(array.nbytes) for name, array in self._host.items()}

    def put(self, *arrays: np.ndarray) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Bring token ids, positions, mask and task ids to the GPU; returns where those that are wanted lie."""
        bound = {}
        for name, array in zip(_SMALL, arrays, strict=True):
            if name in self._wanted:
                held = self._host[name][: array.size]
                held[:] = array.ravel()
                self._device.stream.upload(self._there[name].address, held)
                bound[name] = (self._there[name].address, array.shape)
        return bound
