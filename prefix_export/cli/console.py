"""Show the progress of the exporter's commands, and silence libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefix_export.progress import SILENT, Progress
from prefix_runtime.cli.base import is_dumb_terminal

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, Task

_LEAST_WIDTH_OF_A_BAR = 70


@contextmanager
def showing_progress() -> Iterator[Progress]:
    """Show a bar with the phase, its steps and its time on a terminal, and nothing in a pipe."""
    if not sys.stderr.isatty() or is_dumb_terminal():
        yield SILENT
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    with Bars(*_columns(console.width), console=console, transient=True) as bars:
        yield _Bar(bars)


def _columns(width: int) -> list[ProgressColumn]:
    """The columns of the line. A narrow terminal gets no bar and a shortened name, so that the line never wraps."""
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    class Name(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.description, no_wrap=True, overflow="ellipsis")

    columns: list[ProgressColumn] = [SpinnerColumn(), Name(Column(ratio=1))]
    if width >= _LEAST_WIDTH_OF_A_BAR:
        columns.append(BarColumn(bar_width=20))
    steps = TextColumn("{task.fields[steps]}", table_column=Column(no_wrap=True))
    return [*columns, steps, TimeElapsedColumn(Column(no_wrap=True))]


class _Bar:
    """One line on a terminal, reset for each phase; implements `Progress`."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None, steps="")
        self._total: int | None = None
        self._done = 0.0
        self._unit = ""

    def phase(self, name: str, total: int | None = None, *, detail: str = "", unit: str = "") -> None:
        self._bars.refresh()  # show all steps of the last phase
        self._total, self._done, self._unit = total, 0.0, unit
        shown = f"{name}: {detail}" if detail else name
        self._bars.reset(self._task, description=shown, steps=self._steps())
        self._bars.tasks[0].total = total  # rich's own methods keep the old total if the new one is None
        self._bars.refresh()

    def advance(self, steps: float = 1) -> None:
        self._done += steps
        if self._total is not None:  # a trace may run a layer twice
            self._done = min(self._done, self._total)
        self._bars.update(self._task, completed=self._done, steps=self._steps())

    def _steps(self) -> str:
        return "" if self._total is None else f"{self._done:.0f}/{self._total} {self._unit}".rstrip()


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Within the block, hide progress bars and advice of libraries, which the user cannot follow."""
    import logging as standard_logging
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    standard_logging.getLogger("huggingface_hub").setLevel(standard_logging.ERROR)
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
