"""A GPU's memory, and the stream that copies and runs are ordered on; the only module that imports CUDA's bindings."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from cuda.bindings import runtime as cuda
except ImportError as error:
    raise ImportError("the provider cuda needs CUDA's Python bindings: pip install 'prefix-runtime[gpu]'") from error

from .device_buffer import Blocks
from .errors import ProviderError
from .provider import Cuda


class Event:
    """A point of a stream that can be waited for; of a `cudaEvent_t`."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        weakref.finalize(self, cuda.cudaEventDestroy, handle)

    def wait(self) -> None:
        """Let the host wait until the stream has got there."""
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
        parameters = cuda.cudaMemcpy3DParms()
        parameters.dstPtr = _pitched(target)
        parameters.srcPtr = _pitched(source)
        parameters.extent = cuda.make_cudaExtent(width, height, depth)
        parameters.kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        _check(cuda.cudaMemcpy3DAsync(parameters, self._stream), "copy on the GPU")

    def record(self, event: Event) -> None:
        """Let an event stand for all that was asked of the stream so far."""
        _check(cuda.cudaEventRecord(event.handle, self._stream), "record an event")

    def wait_for(self, event: Event) -> None:
        """Let what is asked from now on begin only when an event of another stream is over."""
        _check(cuda.cudaStreamWaitEvent(self._stream, event.handle, 0), "order two streams")

    def synchronize(self) -> None:
        """Let the host wait until the stream is idle."""
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
        weakref.finalize(self, free, address)


class Device:
    """A GPU, and the stream on it that an engine's runs and copies are ordered on.

    Attributes:
        kind: what onnxruntime calls memory there.
        index: the GPU's number.
        stream: of the engine.
        uploads: a stream beside it, for what is brought in meanwhile.
        lock: held while something runs or memory is taken. A capture by one thread forbids all others to take memory
            or to use the stream.

    Raises:
        ProviderError: there is no such GPU, or no driver.
    """

    kind = "cuda"

    def __init__(self, options: Cuda) -> None:
        self.options, self.index = options, options.device
        count = _value(cuda.cudaGetDeviceCount(), "find a GPU")
        if not 0 <= self.index < count:
            raise ProviderError(f"cuda: device: expected 0 to {count - 1}, found {self.index}")
        self.lock = threading.RLock()
        self.stream = self._new_stream() if options.stream is None else Stream(options.stream)
        self.uploads = self._new_stream()

    def allocate(self, nbytes: int) -> Memory:
        """Memory on the GPU, of any content.

        Raises:
            ProviderError: there is not so much left.
        """
        address = self._made(lambda: cuda.cudaMalloc(max(nbytes, 1)), f"take {nbytes} bytes of GPU {self.index}")
        return Memory(int(address), nbytes, self._free)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in page-locked memory of the host, of any content."""
        nbytes = math.prod(shape) * dtype.itemsize
        address = self._made(lambda: cuda.cudaMallocHost(max(nbytes, 1)), f"lock {nbytes} bytes of the host's memory")
        return np.asarray(_LockedBuffer(int(address), nbytes)).view(dtype).reshape(shape)

    def new_event(self) -> Event:
        """An event on this GPU."""
        flags = cuda.cudaEventDisableTiming
        return Event(self._made(lambda: cuda.cudaEventCreateWithFlags(flags), "make an event"))

    def _new_stream(self) -> Stream:
        flags = cuda.cudaStreamNonBlocking
        return Stream(int(self._made(lambda: cuda.cudaStreamCreateWithFlags(flags), "make a stream")))

    def _free(self, address: int) -> None:
        with self.lock:
            cuda.cudaFree(address)

    def _made(self, make: Callable[[], tuple[Any, ...]], what: str) -> Any:
        """What CUDA makes on this GPU."""
        with self.lock:
            _check(cuda.cudaSetDevice(self.index), f"use GPU {self.index}")
            return _value(make(), what)


class _LockedBuffer:
    """Page-locked memory as numpy reads it; freed with the last array on it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}
        weakref.finalize(self, cuda.cudaFreeHost, address)


def _pitched(blocks: Blocks) -> Any:
    return cuda.make_cudaPitchedPtr(blocks.address, blocks.pitch, blocks.pitch, blocks.height)


def _check(result: tuple[Any, ...], what: str) -> None:
    if (status := result[0]) != cuda.cudaError_t.cudaSuccess:
        raise ProviderError(f"cuda: cannot {what}: {cuda.cudaGetErrorString(status)[1].decode()}")


def _value(result: tuple[Any, ...], what: str) -> Any:
    _check(result, what)
    return result[1]
