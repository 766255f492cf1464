"""Report the progress of long work: named phases, each of which may count its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Receives phases and steps during long work. The library calls it, and the command line shows them."""

    def phase(self, name: str, total: int | None = None, *, detail: str = "", unit: str = "") -> None:
        """Begin a phase, and end the one before it.

        Args:
            name: a verb, such as "load" or "export". Phases of the same name count as one.
            total: the number of steps, if it is known.
            detail: the current object, such as a task; shown beside the name.
            unit: the unit of the steps, such as "MB"; empty for plain numbers.
        """

    def advance(self, steps: float = 1) -> None:
        """Count more finished steps of the phase."""


class _Silent:
    def phase(self, name: str, total: int | None = None, *, detail: str = "", unit: str = "") -> None:
        pass

    def advance(self, steps: float = 1) -> None:
        pass


SILENT: Progress = _Silent()
"""Shows nothing; the library's default."""


class PhaseTimes:
    """Measures each phase, and passes all calls on to another progress.

    Args:
        shown: the progress that receives all calls.
        clock: a function that returns seconds.

    Attributes:
        seconds: the seconds of each finished phase, by name, in the order in which they began.
    """

    def __init__(self, shown: Progress, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._shown, self._clock = shown, clock
        self._name: str | None = None
        self._began = 0.0

    def phase(self, name: str, total: int | None = None, *, detail: str = "", unit: str = "") -> None:
        """See `Progress`."""
        self.end()
        self._name, self._began = name, self._clock()
        self._shown.phase(name, total, detail=detail, unit=unit)

    def advance(self, steps: float = 1) -> None:
        """See `Progress`."""
        self._shown.advance(steps)

    def end(self) -> None:
        """End the last phase."""
        if self._name is not None:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + self._clock() - self._began
            self._name = None


def shown_task(task: str | None) -> str:
    """The name of a task for people."""
    return "the bare model" if task is None else task
