"""Keys and values on a GPU, and the state of decode steps beside them: a greedy step needs nothing from the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from prefix_runtime.backends.gpu.buffer import DeviceBuffer
from prefix_runtime.backends.gpu.prefix_store import PrefixStore
from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.cache.cache import Cache, Row
from prefix_runtime.errors import ProviderError
from prefix_runtime.prefix.cache_format import CacheFormat
from prefix_runtime.prefix.geometry import Geometry
from prefix_runtime.prefix.prefix import Prefix

from .binding import Binding
from .session import Session

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.device import Device, Stream

_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)
_UNDER_WAY = 2
"""Steps that the GPU is asked for at once: it begins the next one while the host reads the tokens of the last."""


class CudaCache(Cache):
    """A cache for graphs of the target "cuda", whose buffers lie on a GPU.

    The graph returns what the next step is given: the most likely token, the next position, the mask with one more
    position. These are copied over its inputs on the GPU, so that the next step is asked for before the host waits for
    the token of this one. Steps are captured as CUDA graphs, one for each number of rows; rows that have left are run
    along until fewer than half of them are left, so that there are few of these.

    Args:
        session: of the graph, with its device.
        geometry: the model's.
        rows: of the batch.
        capacity: positions of each row.
        cache_format: of the graph's past and present.
        prefixes: on the GPU.

    Raises:
        ProviderError: the graph was made for another target, or the GPU has no room.
    """

    is_seeded_at_once = True
    CAPACITY_STEP = 256
    """As `cache_pool.CAPACITY_STEP`: each length is captured once."""

    def __init__(
        self,
        session: Session,
        geometry: Geometry,
        rows: int,
        capacity: int,
        *,
        cache_format: CacheFormat,
        prefixes: PrefixStore,
    ) -> None:
        assert session.device is not None
        if not session.outputs.issuperset(contract.NEXT_INPUTS):
            raise ProviderError(
                "provider 'cuda': expected a graph in float16 or bfloat16 that was made for GPUs, found another; "
                "build the bundle with --target cuda"
            )
        self._session, self._device, self._prefixes, self._format = session, session.device, prefixes, cache_format
        self._stream = self._device.stream
        self._geometry = geometry
        self._buffer = DeviceBuffer(self._device, geometry, cache_format.dtype.itemsize, rows, capacity)
        super().__init__(rows, capacity, self._buffer.nbytes)
        self._awaited: tuple[int, DeviceBuffer, int] | None = None
        """The row that was seeded last, where its prefix lies and how long that is, until it is copied."""
        self._state = _State(self._device, rows, capacity)
        self._prompt_state = _State(self._device, 1, capacity, sequence=capacity)
        self._vocab_size = geometry.vocab_size
        self._logits = self._device.allocate(rows * geometry.vocab_size * _FLOAT32.itemsize)
        self._host_logits = self._device.pinned((rows, geometry.vocab_size), _FLOAT32)
        self._is_read = self._device.new_event()
        self._prompt = session.binding()
        self._steps: dict[int, Binding] = {}
        self._chosen = tuple(_Chosen(self._device, rows) for _ in range(_UNDER_WAY))
        self._running: deque[_Chosen] = deque()
        """Of the steps that are under way, the oldest first."""
        self._asked: list[int] = []
        """The tokens that the oldest of these was given."""
        self._ready = _Ready()

    def seed(self, row: int, prefix: Prefix | None) -> None:
        """See `Cache`: the prefix is copied on the GPU, in the turn of what is asked of the rows next."""
        held = self.rows[row]
        held.prefix = None  # until the new one is there
        if self._awaited is not None and self._awaited[0] != row:
            with self._device.turn():
                self._copy_awaited()
        self._awaited = None
        if prefix is not None:
            self._awaited = row, self._prefixes.get(prefix), prefix.prefix_length
        held.prefix = prefix
        self.reset(row)

    def reset(self, row: int) -> None:
        """See `Cache`."""
        self._fill(row, self.rows[row].begin())

    def move(self, source: int, target: int) -> None:
        """See `Cache`."""
        self.fork(source, target, 0)
        self._ready = _Ready()

    def fork(self, source: int, target: int, start: int) -> None:
        """See `Cache`: copied on the GPU. For a row that is as long as before the GPU's state stays."""
        left, right = self.rows[source], self.rows[target]
        self._running.clear()
        if (left.length, left.offset) != (right.length, right.offset):
            self._ready = _Ready()
        right.prefix = None  # until the copy is whole
        with self._device.turn():
            self._copy_awaited()
            self._buffer.copy_row(target, self._buffer, source, left.length, start)
        right.copy_from(left)

    def prefill(self, row: int, token_ids: Sequence[int], keep_all_logits: bool = False) -> np.ndarray:
        """See `Cache`."""
        held, count = self.rows[row], len(token_ids)
        self._check_room(held, count)
        kept = count if keep_all_logits else 1
        host_logits = self._host_logits[:1]
        logits = self._logits
        if keep_all_logits:
            host_logits = self._device.pinned((kept, self._vocab_size), _FLOAT32)
            logits = self._device.allocate(host_logits.nbytes)
        self._run_prompt(row, token_ids, logits.address, kept)
        self._fill(row, held.length + count)
        self._read(host_logits, logits.address)
        return host_logits.copy() if keep_all_logits else host_logits[0]  # page-locked memory stays here

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Cache`."""
        count = len(token_ids)
        self._begin(token_ids)
        self._launch()
        self._running.clear()  # the caller chooses
        self._end(count)
        self._read(self._host_logits[:count], self._logits.address)
        return self._host_logits[:count]

    def choose(self, token_ids: Sequence[int], *, more: int) -> list[int]:
        """See `Cache`: where more may follow, the GPU has the next step to do before the host waits for this one."""
        tokens = list(token_ids)
        if not self._running or self._asked != tokens:
            self._begin(tokens)
            self._launch()
        while len(self._running) < min(_UNDER_WAY, 1 + more) and max(self._ready.lengths or [0]) < self.capacity:
            self._launch()
        self._asked = self._running.popleft().read(len(tokens))
        self._end(len(tokens))
        if not self._running:
            self._ready.token_ids = self._asked
        return self._asked

    def _begin(self, token_ids: Sequence[int]) -> None:
        """Let the GPU hold what a step of the first rows is given; mostly it does, and a token is all that it needs."""
        count = len(token_ids)
        for held in self.rows[:count]:
            self._check_room(held, 1)
        given = list(token_ids)
        self._running.clear()
        if self._ready.lengths == [held.length for held in self.rows[:count]]:
            if self._ready.token_ids != given:
                with self._device.turn():
                    self._state.put_ids(self._stream, given)
        else:
            together = _run_together(count, len(self.rows))
            for held in self.rows[count:together]:
                # It has left, and is run along from an empty beginning, over what it held.
                held.prefix, held.length, held.offset = None, 0, 0
            with self._device.turn():
                self._copy_awaited()
                self._state.put(self._stream, given, self.rows[:together])
            self._ready = _Ready(together, [held.length for held in self.rows[:count]])
        self._ready.token_ids = given

    def _launch(self) -> None:
        """Ask for a step, for its outputs as the next one's inputs, and for the tokens."""
        together = self._ready.together
        chosen = next(each for each in self._chosen if each not in self._running)
        if together not in self._steps:
            self._steps[together] = self._bound_step(together)
        self._steps[together].run()
        with self._device.turn():
            self._state.advance(self._stream)
            self._running.append(chosen)
            chosen.copy(self._stream, self._state.address(contract.INPUT_IDS))
        self._ready.lengths = [length + 1 for length in self._ready.lengths or ()]
        self._ready.token_ids = None

    def _end(self, count: int) -> None:
        for held in self.rows[:count]:
            held.length += 1

    def _copy_awaited(self) -> None:
        """Let the GPU copy the prefix of the row that was seeded last, if it has not yet."""
        if self._awaited is not None:
            row, source, length = self._awaited
            self._buffer.copy_row(row, source, 0, length)
            self._awaited = None

    def _fill(self, row: int, length: int) -> None:
        self.rows[row].length = length
        self._ready = _Ready()
        self._running.clear()

    def _read(self, array: np.ndarray, address: int) -> None:
        with self._device.turn():
            self._stream.download(array, address)
            self._stream.record(self._is_read)
        self._is_read.wait()

    def _bound_step(self, rows: int) -> Binding:
        binding = self._session.binding(is_replayed=True)
        widths = (1, 1, self.capacity)
        for name, returned, width in zip(contract.STEP_INPUTS, contract.NEXT_INPUTS, widths, strict=True):
            binding.input_at(name, self._state.address(name), (rows, width), _INT64)
            following = self._state.address(name, following=True)
            binding.output_at(returned, following, (rows, width), _INT64)
        binding.input(contract.NUM_LOGITS_TO_KEEP, np.array(1, np.int64))
        binding.output_at(contract.LOGITS, self._logits.address, (rows, 1, self._vocab_size), _FLOAT32)
        self._bind_layers(binding, 0, rows)
        return binding

    def _run_prompt(self, row: int, token_ids: Sequence[int], logits: int, kept: int) -> None:
        held, count = self.rows[row], len(token_ids)
        binding, state = self._prompt, self._prompt_state
        with self._device.turn():
            self._copy_awaited()
            state.put_prompt(self._stream, token_ids, held)
        for name, width in zip(contract.STEP_INPUTS, (count, count, held.length + count), strict=True):
            binding.input_at(name, state.address(name), (1, width), _INT64)
        binding.input(contract.NUM_LOGITS_TO_KEEP, np.array(0 if kept > 1 else 1, np.int64))
        binding.output_at(contract.LOGITS, logits, (1, kept, self._vocab_size), _FLOAT32)
        self._bind_layers(binding, row, 1)
        binding.run()

    def _bind_layers(self, binding: Binding, row: int, rows: int) -> None:
        for index, layer in enumerate(self._geometry.layers):
            shape = (rows, layer.key_value_heads, self.capacity, layer.head_dim)
            for part, name in enumerate(contract.PARTS):
                address = self._buffer.address(index, part, row)
                past, present = (
                    contract.tensor_name(group, index, name) for group in (contract.PAST, contract.PRESENT)
                )
                binding.input_at(past, address, shape, self._format.dtype)
                binding.output_at(present, address, shape, self._format.dtype)


class _Chosen:
    """Where a step's tokens come to on the host, [rows] int64, in page-locked memory."""

    def __init__(self, device: Device, rows: int) -> None:
        self._tokens, self._is_there = device.pinned((rows,), _INT64), device.new_event()

    def copy(self, stream: Stream, address: int) -> None:
        """Let the GPU copy them."""
        stream.download(self._tokens, address)
        stream.record(self._is_there)

    def read(self, count: int) -> list[int]:
        """The first ones, as soon as they are there."""
        self._is_there.wait()
        tokens: list[int] = self._tokens[:count].tolist()
        return tokens


class _Ready:
    """What the GPU holds for the next step, as far as the host knows.

    Attributes:
        together: rows that are run.
        lengths: filled positions of those of them that count; None where the GPU holds nothing of use.
        token_ids: that these are given.
    """

    def __init__(self, together: int = 0, lengths: list[int] | None = None) -> None:
        self.together, self.lengths = together, lengths
        self.token_ids: list[int] | None = None


class _State:
    """The small inputs of a run, [rows, sequence], [rows, sequence] and [rows, capacity] int64, one behind the other.

    Args:
        device: the GPU.
        rows: of the batch.
        capacity: positions of each row.
        sequence: tokens of each row.
    """

    def __init__(self, device: Device, rows: int, capacity: int, sequence: int = 1) -> None:
        self._width, self._capacity = rows * sequence, capacity
        self._held = device.pinned((2 * self._width + rows * capacity,), _INT64)
        self._held[:] = 0
        self._current, self._following = device.allocate(self._held.nbytes), device.allocate(self._held.nbytes)

    def address(self, name: str, *, following: bool = False) -> int:
        """Where an input lies, or where the run leaves it for the next one."""
        memory = self._following if following else self._current
        return memory.address + contract.STEP_INPUTS.index(name) * self._width * _INT64.itemsize

    def put(self, stream: Stream, token_ids: Sequence[int], rows: Sequence[Row]) -> None:
        """Let the GPU hold a step of some rows; those without a token are given the first of the vocabulary."""
        ids, positions, mask = self._parts()
        ids[: len(token_ids)], ids[len(token_ids) :] = token_ids, 0
        mask = mask.reshape(-1, self._capacity)
        for row, held in enumerate(rows):
            positions[row] = held.position
            mask[row, : held.length + 1], mask[row, held.length + 1 :] = 1, 0
        stream.upload(self._current.address, self._held)

    def put_ids(self, stream: Stream, token_ids: Sequence[int]) -> None:
        """Let the GPU hold other tokens for the same step."""
        ids = self._parts()[0][: len(token_ids)]
        ids[:] = token_ids
        stream.upload(self._current.address, ids)

    def put_prompt(self, stream: Stream, token_ids: Sequence[int], held: Row) -> None:
        """Let the GPU hold a row's prompt."""
        ids, positions, mask = self._parts()
        count = len(token_ids)
        ids[:count] = token_ids
        positions[:count] = np.arange(held.position, held.position + count)
        mask[: held.length + count] = 1
        stream.upload(self._current.address, self._held)

    def advance(self, stream: Stream) -> None:
        """Let what the run left be the next one's."""
        stream.copy(self._current.address, self._following.address, self._held.nbytes)

    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        width = self._width
        return self._held[:width], self._held[width : 2 * width], self._held[2 * width :]


def _run_together(count: int, rows: int) -> int:
    """How many rows are run where so many count: the next power of two, or all."""
    return min(1 << (count - 1).bit_length(), rows)
