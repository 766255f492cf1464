"""A GPU's memory, and the stream that copies and runs are ordered on; the only module that imports CUDA's bindings."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

try:
    from cuda.bindings import runtime as cuda
    from cuda.bindings.driver import cuuint64_t
except ImportError as error:
    raise ImportError("a GPU needs CUDA's Python bindings: pip install 'prefix-runtime[gpu]'") from error

from prefix_runtime.backends.options import Cuda
from prefix_runtime.errors import ProviderError

from .blocks import Blocks


class Event:
    """A point of a stream that can be waited for; of a `cudaEvent_t`."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        weakref.finalize(self, _destroy_event, handle).atexit = False

    def wait(self) -> None:
        """Let the host wait until the stream has got there."""
        with _beside_captures():
            _check(cuda.cudaEventSynchronize(self.handle), "wait for the GPU")


class Stream:
    """Copies on a GPU, one after another, while the host goes on.

    Args:
        handle: of a `cudaStream_t`.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._stream = cuda.cudaStream_t(handle)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a C-contiguous array to the GPU; page-locked, it must stay as it is until the stream has got there."""
        self._copy(address, array.ctypes.data, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the GPU into a C-contiguous, page-locked array, which is filled when the stream has got there."""
        self._copy(array.ctypes.data, address, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy from one address on the GPU to another."""
        self._copy(target, source, nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def copy_blocks(self, target: Blocks, source: Blocks, width: int, height: int, depth: int) -> None:
        """Copy `depth` groups of `height` pieces of `width` bytes on the GPU, in one step."""
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if target.height == source.height == height:  # no gaps between groups: the host is done in a sixth of the time
            places = target.address, target.pitch, source.address, source.pitch
            status = cuda.cudaMemcpy2DAsync(*places, width, height * depth, kind, self._stream)
            _check(status, "copy on the GPU")
            return
        parameters = cuda.cudaMemcpy3DParms()
        parameters.dstPtr = _pitched(target)
        parameters.srcPtr = _pitched(source)
        parameters.extent = cuda.make_cudaExtent(width, height, depth)
        parameters.kind = kind
        _check(cuda.cudaMemcpy3DAsync(parameters, self._stream), "copy on the GPU")

    def record(self, event: Event) -> None:
        """Let an event stand for all that was asked of the stream so far."""
        _check(cuda.cudaEventRecord(event.handle, self._stream), "record an event")

    def wait_for(self, event: Event) -> None:
        """Let what is asked from now on begin only when an event of another stream is over."""
        _check(cuda.cudaStreamWaitEvent(self._stream, event.handle, 0), "order two streams")

    def synchronize(self) -> None:
        """Let the host wait until the stream is idle; nothing may be captured on it."""
        _check(cuda.cudaStreamSynchronize(self._stream), "wait for the GPU")

    def _copy(self, target: int, source: int, nbytes: int, kind: Any) -> None:
        _check(cuda.cudaMemcpyAsync(target, source, nbytes, kind, self._stream), "copy")


class Memory:
    """Bytes on a GPU, freed with this object.

    Attributes:
        address: of the first.
        nbytes: how many there are.
    """

    def __init__(self, address: int, nbytes: int, free: Callable[[int], object]) -> None:
        self.address, self.nbytes = address, nbytes
        weakref.finalize(self, free, address).atexit = False  # the stream may be gone by then


class Device:
    """A GPU, and the stream on it that an engine's runs and copies are ordered on.

    Attributes:
        kind: what onnxruntime calls memory there.
        index: the GPU's number.
        name: the GPU's, as its driver has it.
        stream: of the engine.
        uploads: a stream beside it, for what is brought in meanwhile.

    Raises:
        ProviderError: there is no such GPU, or no driver.
    """

    kind = "cuda"

    def __init__(self, options: Cuda) -> None:
        self.options, self.index = options, options.device
        count = _value(cuda.cudaGetDeviceCount(), "find a GPU")
        if not 0 <= self.index < count:
            raise ProviderError(f"cuda: device: expected 0 to {count - 1}, found {self.index}")
        self.name: str = _value(cuda.cudaGetDeviceProperties(self.index), "ask what GPU it is").name.decode()
        self._turns = _Turns(self.index) if options.stream is None else _turns_of(options.stream, self.index)
        self.stream = self._new_stream() if options.stream is None else Stream(options.stream)
        self.uploads = self._new_stream()
        self._pool = self._new_pool()
        self._brought = self.new_event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A thread's turn at the GPU: needed for all that is asked of it but for waiting.

        While a thread captures a CUDA graph, no other may use its stream: engines that were given one share their
        turns. All else is allowed beside a capture. Turns nest; the thread is left with the GPU that it used before.
        """
        with self._turns.lock, _beside_captures():
            before = _value(cuda.cudaGetDevice(), "find the GPU in use")
            if before == self.index:
                self._turns.free()
                yield
                return
            try:
                _check(cuda.cudaSetDevice(self.index), f"use GPU {self.index}")
                self._turns.free()
                yield
            finally:
                cuda.cudaSetDevice(before)

    def allocate(self, nbytes: int, stream: Stream | None = None) -> Memory:
        """Memory on the GPU, of any content.

        What is freed may be taken again at once, without waiting for what runs: CUDA orders one after the other. Memory
        whose object is collected is freed at the next turn.

        Args:
            nbytes: how much.
            stream: that uses it first; None for the engine's.

        Raises:
            ProviderError: there is not so much left.
        """
        handle = (stream or self.stream).handle
        address = self._made(
            lambda: cuda.cudaMallocFromPoolAsync(max(nbytes, 1), self._pool, handle),
            f"take {nbytes} bytes of GPU {self.index}",
        )
        return Memory(int(address), nbytes, partial(self._turns.retire, self.stream, self.uploads, self._brought))

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in page-locked memory of the host, of any content."""
        nbytes = math.prod(shape) * dtype.itemsize
        address = self._made(lambda: cuda.cudaMallocHost(max(nbytes, 1)), f"lock {nbytes} bytes of the host's memory")
        return np.asarray(_LockedBuffer(int(address), nbytes)).view(dtype).reshape(shape)

    def new_event(self) -> Event:
        """An event on this GPU."""
        flags = cuda.cudaEventDisableTiming
        return Event(self._made(lambda: cuda.cudaEventCreateWithFlags(flags), "make an event"))

    def await_uploads(self) -> None:
        """Let what the engine's stream is asked from now on begin, on the GPU, when all uploads so far are over."""
        self.uploads.record(self._brought)
        self.stream.wait_for(self._brought)

    def _new_stream(self) -> Stream:
        flags = cuda.cudaStreamNonBlocking
        return Stream(int(self._made(lambda: cuda.cudaStreamCreateWithFlags(flags), "make a stream")))

    def _new_pool(self) -> Any:
        """Memory that stays with the process when it is freed, as long as this device is in use."""
        place = cuda.cudaMemPoolProps()
        place.allocType = cuda.cudaMemAllocationType.cudaMemAllocationTypePinned
        place.location.type = cuda.cudaMemLocationType.cudaMemLocationTypeDevice
        place.location.id = self.index
        pool = self._made(lambda: cuda.cudaMemPoolCreate(place), "make a pool of memory")
        weakref.finalize(self, cuda.cudaMemPoolDestroy, pool).atexit = False
        attribute = cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        _check(cuda.cudaMemPoolSetAttribute(pool, attribute, cuuint64_t(2**64 - 1)), "keep freed memory")
        return pool

    def _made(self, make: Callable[[], tuple[Any, ...]], what: str) -> Any:
        """What CUDA makes on this GPU."""
        with self.turn():
            return _value(make(), what)


class _LockedBuffer:
    """Page-locked memory as numpy reads it; freed with the last array on it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}
        weakref.finalize(self, _free_host, address).atexit = False


class _Turns:
    """The turns at a stream: its lock, and memory that is freed in the next turn.

    A finaliser runs in any thread at any moment, also in one that holds a lock, so it takes none: it queues.

    Args:
        index: the GPU's number.
    """

    def __init__(self, index: int) -> None:
        self.lock = threading.RLock()
        self._unused: deque[Callable[[], object]] = deque()
        weakref.finalize(self, _free_last, self._unused, index).atexit = False

    def retire(self, stream: Stream, uploads: Stream, uploaded: Event, address: int) -> None:
        """Queue memory of a stream and its uploads to be freed."""
        self._unused.append(partial(_free, stream, uploads, uploaded, address))

    def free(self) -> None:
        """Free what is queued; in a turn."""
        while self._unused:
            self._unused.popleft()()


def _free(stream: Stream, uploads: Stream, uploaded: Event, address: int) -> None:
    uploads.record(uploaded)
    stream.wait_for(uploaded)  # what is freed may be on its way still
    cuda.cudaFreeAsync(address, stream.handle)


def _free_last(unused: deque[Callable[[], object]], index: int) -> None:
    """Free what is queued when nobody takes turns any more."""
    if not unused:
        return
    with _beside_captures():
        before = _value(cuda.cudaGetDevice(), "find the GPU in use")
        cuda.cudaSetDevice(index)
        while unused:
            unused.popleft()()
        cuda.cudaSetDevice(before)


_turns: weakref.WeakValueDictionary[int, _Turns] = weakref.WeakValueDictionary()
_turns_lock = threading.Lock()


def _turns_of(stream: int, index: int) -> _Turns:
    """The turns at a stream that engines were given, for as long as one of them is there."""
    with _turns_lock:
        return _turns.setdefault(stream, _Turns(index))


_BESIDE = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
"""Of a thread: it may take memory and wait for events while another captures, which CUDA forbids by default."""


def _exchange_mode(mode: Any) -> Any:
    return _value(cuda.cudaThreadExchangeStreamCaptureMode(mode), "run beside a capture")


@contextmanager
def _beside_captures() -> Iterator[None]:
    before = _exchange_mode(_BESIDE)
    try:
        yield
    finally:
        _exchange_mode(before)


def _destroy_event(handle: Any) -> None:
    with _beside_captures():
        cuda.cudaEventDestroy(handle)


def _free_host(address: int) -> None:
    with _beside_captures():
        cuda.cudaFreeHost(address)


def _pitched(blocks: Blocks) -> Any:
    return cuda.make_cudaPitchedPtr(blocks.address, blocks.pitch, blocks.pitch, blocks.height)


def _check(result: tuple[Any, ...], what: str) -> None:
    if (status := result[0]) != cuda.cudaError_t.cudaSuccess:
        raise ProviderError(f"cuda: cannot {what}: {cuda.cudaGetErrorString(status)[1].decode()}")


def _value(result: tuple[Any, ...], what: str) -> Any:
    _check(result, what)
    return result[1]
