"""The thread that a session on a GPU lives in, from its opening to its end."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

_Opened = TypeVar("_Opened")
_Result = TypeVar("_Result")
_Tasks = SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None]
"""Work with what was opened and where its result goes; None ends the thread."""

_LONGEST_END = 10.0
"""Seconds that the process waits for a thread when it exits."""


class _Device(Protocol):
    def turn(self) -> AbstractContextManager[None]: ...


class WorkerThread(Generic[_Opened]):
    """A thread in which a session is opened, run and closed on a GPU, whoever asks.

    onnxruntime's CUDA provider keeps handles, memory and captured graphs for each thread that has run a session, as
    long as that thread lives (1.31: 75 MB a thread for the smallest model). The thread owns the session: a session that
    another thread drops while its own thread ends crashes the process. So the thread drops it, and then ends.

    The queue is a `SimpleQueue` because a finaliser may put work into it at any moment, without a lock.

    Args:
        device: the GPU; each piece of work is done in a turn at it.
        open_session: opens the session; its errors are raised here.
    """

    def __init__(self, device: _Device, open_session: Callable[[], _Opened]) -> None:
        self._tasks: _Tasks = SimpleQueue()
        opening: Future[None] = Future()
        arguments = (device, open_session, self._tasks, opening)
        self._thread = threading.Thread(target=_work, args=arguments, name="prefix-runtime-cuda", daemon=True)
        weakref.finalize(self, self._tasks.put, None).atexit = False
        _running[self._thread] = self._tasks
        self._thread.start()
        opening.result()

    def ask(self, work: Callable[[_Opened], _Result]) -> _Result:
        """Do work with the session and wait for it. Call it without a turn at the GPU, because the thread needs one.

        Raises:
            RuntimeError: the process exits, and the thread has ended.
        """
        result: Future[_Result] = Future()
        self._tasks.put((work, result))
        if not self._thread.is_alive():
            raise RuntimeError("expected the session's thread to run, found that the process exits")
        return result.result()

    def ask_for_later(self, work: Callable[[_Opened], object]) -> None:
        """Have something done with the session soon. Takes no lock, because finalisers call it."""
        self._tasks.put((work, Future()))


_running: weakref.WeakKeyDictionary[threading.Thread, _Tasks] = weakref.WeakKeyDictionary()


def _work(device: _Device, open_session: Callable[[], Any], tasks: _Tasks, opening: Future[None]) -> None:
    try:
        with device.turn():
            session = open_session()
    except BaseException as error:  # noqa: BLE001  # whoever asked gets it
        opening.set_exception(error)
        return
    opening.set_result(None)
    while (task := tasks.get()) is not None:
        _do(device, session, *task)
        del task  # what it holds lives no longer than needed
    with device.turn():
        del session


def _do(device: _Device, session: Any, work: Callable[[Any], Any], result: Future[Any]) -> None:
    try:
        with device.turn():
            done = work(session)
    except BaseException as error:  # noqa: BLE001  # whoever asked gets it
        # Without the frames of this thread, which would keep the session alive as long as the error.
        result.set_exception(error.with_traceback(None))
    else:
        result.set_result(done)


@atexit.register
def _end_all() -> None:
    """Close the sessions that are still open, each in its thread, before onnxruntime's libraries are unloaded."""
    threads = dict(_running)
    for tasks in threads.values():
        tasks.put(None)
    for thread in threads:
        thread.join(_LONGEST_END)
