"""The thread that owns a session on a GPU: it opens it, runs it and drops it, and finalisers may ask of it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest

from prefix_runtime.backends.onnxruntime.worker_thread import WorkerThread


class Device:
    """Turns at a GPU that is not there."""

    def __init__(self):
        self._lock = threading.RLock()

    def turn(self):
        return self._lock


class Opened:
    """In place of a session: it notes which thread opened it, used it and dropped it."""

    def __init__(self, threads):
        self.threads = threads
        threads.append(("open", threading.get_ident()))
        weakref.finalize(self, lambda: threads.append(("drop", threading.get_ident()))).atexit = False

    def run(self):
        self.threads.append(("run", threading.get_ident()))
        return 3


def test_one_thread_opens_runs_and_drops_the_session():
    threads = []
    worker = WorkerThread(Device(), lambda: Opened(threads))
    assert worker.ask(Opened.run) == 3
    thread = worker._thread
    del worker
    thread.join(10)
    assert [what for what, _ in threads] == ["open", "run", "drop"]
    assert {ident for _, ident in threads} == {threads[0][1]}
    assert threads[0][1] != threading.get_ident()


def test_an_error_keeps_no_session_alive():
    threads = []
    worker = WorkerThread(Device(), lambda: Opened(threads))

    def fail(opened):
        raise ValueError(f"not {opened.run()}")

    try:
        worker.ask(fail)
    except ValueError as error:
        kept = error.with_traceback(None)  # its frames here keep the worker
    thread = worker._thread
    del worker
    gc.collect()
    thread.join(10)
    assert [what for what, _ in threads] == ["open", "run", "drop"]
    assert str(kept) == "not 3"


def test_an_error_of_opening_is_raised_where_the_session_is_asked_for():
    def fail():
        raise OSError("no such graph")

    with pytest.raises(OSError, match="no such graph"):
        WorkerThread(Device(), fail)


def test_what_a_finaliser_asks_for_waits_for_no_lock_and_comes_first():
    device, done = Device(), []
    worker = WorkerThread(device, object)
    with device.turn():
        worker.ask_for_later(lambda _: done.append("released"))
        assert done == []
    assert worker.ask(lambda _: [*done, "asked"]) == ["released", "asked"]


def test_what_fails_later_disturbs_nobody():
    worker = WorkerThread(Device(), object)
    worker.ask_for_later(lambda _: 1 / 0)
    assert worker.ask(lambda _: "next") == "next"


def test_a_process_that_exits_closes_its_sessions_first():
    program = """
import threading
from prefix_runtime.backends.onnxruntime.worker_thread import WorkerThread

class Device:
    turn = threading.RLock

class Opened:
    def __del__(self):
        print("dropped", flush=True)

worker = WorkerThread(Device(), Opened)
print(worker.ask(lambda opened: "ran"), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["ran", "dropped"]
    assert done.stderr == ""
