"""How far a long piece of work is: named phases, each of which may count its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Told of phases and steps while work goes on; the library tells, the command line shows."""

    def phase(self, name: str, total: int | None = None, *, detail: str = "", unit: str = "") -> None:
        """A phase begins, and the one before it ends.

        Args:
            name: a verb: "load", "export". Times are added up by it.
            total: its steps, if they are known.
            detail: what it works on now, such as a task; shown, and not part of the name.
            unit: of the steps, if they are not plain numbers, such as "MB".
        """

    def advance(self, steps: float = 1) -> None:
        """So many more steps of the phase are done."""


class _Silent:
    def phase(self, name: str, total: int | None = None, *, detail: str = "", unit: str = "") -> None:
        pass

    def advance(self, steps: float = 1) -> None:
        pass


SILENT: Progress = _Silent()
"""Shows nothing: what the library does by default."""


class PhaseTimes:
    """Passes everything on to another progress and measures each phase.

    Args:
        shown: told of all that this is told of.
        clock: seconds.

    Attributes:
        seconds: of each phase that has ended, by its name, in the order in which they began.
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
        """The last phase ends."""
        if self._name is not None:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + self._clock() - self._began
            self._name = None


def shown_task(task: str | None) -> str:
    """A task as a person reads it."""
    return "the bare model" if task is None else task
