"""The thread that a session on a GPU lives in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.device import Device

_Result = TypeVar("_Result")


class WorkerThread:
    """The thread in which a session is opened and run on a GPU, whoever asks.

    onnxruntime's CUDA provider keeps handles, memory and captured graphs for each thread that has run a session, as
    long as that lives (1.31: 75 MB a thread for the smallest model).
    """

    def __init__(self, device: Device) -> None:
        self._device, self._pool = device, ThreadPoolExecutor(1, "prefix-runtime-cuda")
        self._for_later: deque[Callable[[], object]] = deque()

    def ask(self, work: Callable[[], _Result]) -> _Result:
        """Have something done, and wait for it; without a turn at the GPU, which this thread needs."""
        return self._pool.submit(self._do, work).result()

    def ask_for_later(self, work: Callable[[], object]) -> None:
        """Have something done before what is asked next. Takes no lock, as finalisers call it: it queues."""
        self._for_later.append(work)

    def _do(self, work: Callable[[], _Result]) -> _Result:
        with self._device.turn():
            while self._for_later:
                self._for_later.popleft()()
            return work()
