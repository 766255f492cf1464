"""Ctrl-C, a polite kill and the end of a terminal: a program ends with one line, without a traceback."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_POLITE = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_FIRST_SIGNAL_STATUS = 128
"""A shell adds it to the number of the signal that ended a program: Ctrl-C is 130, SIGTERM 143, SIGHUP 129."""

_LATER = 0.01
"""Seconds until the callback in which a signal came is over."""


def exit_at_once() -> None:
    """End the process by Ctrl-C without a traceback, as long as there is nothing to clean up.

    A console script calls this before its imports. `ending_when_stopped` replaces it while a command runs.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
        signal.signal(signal.SIGINT, _exit)


@contextmanager
def ending_when_stopped() -> Iterator[None]:
    """End the program with "Aborted!" and the exit code of the signal, after everything half-written was removed.

    A signal raises SystemExit in the main thread, so that context managers clean up on the way out. Libraries may turn
    that into an error of their own, so any error that follows a signal ends the program in the same way. It is no
    KeyboardInterrupt, because Python ends with that, not with an exit code, if it passed through `exec` (3.11).

    Raises:
        SystemExit: the exit code is 128 plus the signal's number.
    """
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise SystemExit(_FIRST_SIGNAL_STATUS + number)

    before = {number: signal.signal(number, stop) for number in _heeded()}
    try:
        with _signals_not_lost(received):
            yield
    except BaseException:
        if not received:
            raise
        sys.stderr.write(_line(is_terminal=sys.stderr.isatty()))
        raise SystemExit(_FIRST_SIGNAL_STATUS + received[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_not_lost(received: list[int]) -> Iterator[None]:
    """Send a signal again if it came while Python ran a callback that can raise nothing, as there are many in imports.

    Python would print what the handler raised, and go on.
    """
    before = sys.unraisablehook

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        if received and unraisable.exc_type is SystemExit:
            threading.Timer(_LATER, _send, [received[0]]).start()
        else:
            before(unraisable)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _send(number: int) -> None:
    """Send a signal to the main thread, so that it wakes where it waits; Windows can only mark the signal as come."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(signal.Signals(number))


def _heeded() -> list[signal.Signals]:
    """The signals to handle: not those that whoever started this process ignores, as nohup does."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        return []
    polite = [signal.Signals[name] for name in _POLITE if name in signal.Signals.__members__]
    return [each for each in polite if signal.getsignal(each) is not signal.SIG_IGN]


def _exit(number: int, _frame: FrameType | None) -> None:
    os.write(2, _line(is_terminal=os.isatty(2)).encode())
    os._exit(_FIRST_SIGNAL_STATUS + number)


def _line(*, is_terminal: bool) -> str:
    return "\nAborted!\n" if is_terminal else "Aborted!\n"  # a terminal shows ^C at the beginning of the line
