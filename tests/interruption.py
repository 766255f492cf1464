"""Exceptions raised at each of the moments at which Python lets a signal's handler, or another thread, raise one."""

from __future__ import annotations

import contextlib
import dis
import sys
from pathlib import Path

import prefix_runtime

_RUNTIME = str(Path(prefix_runtime.__file__).parent)
# CPython 3.11 looks for signals behind these: when a function begins or goes on, behind a call, before a loop goes on.
# `with` has no such moment between entering and its block, nor between its block and leaving.
_LOOKS_BEHIND = {"RESUME", "CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD"}


class Interrupted(BaseException):
    """What is raised; no code may catch it by name."""


def interrupted(work, moment):
    """Do something and raise `Interrupted` at its `moment`-th moment; returns how many moments went by.

    Only moments in the runtime and in contextlib count. Where there are fewer, nothing is raised.
    """
    moments, last = 0, {}

    def trace(frame, event, _argument):
        nonlocal moments
        if not frame.f_code.co_filename.startswith((_RUNTIME, contextlib.__file__)):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            operation = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            before, last[id(frame)] = last.get(id(frame)), operation
            if before in _LOOKS_BEHIND:
                moments += 1
                if moments == moment:
                    raise Interrupted
        else:  # the beginning, the end, or an error, behind which Python does not look
            last.pop(id(frame), None)
        return trace

    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None  # what is raised in a finaliser; pytest's hook would keep what its frames know
    sys.settrace(trace)
    try:
        work()
    except Interrupted:
        pass
    finally:
        sys.settrace(None)
        sys.unraisablehook = hook
    return moments
