"""What is told while a long piece of work goes on."""

from __future__ import annotations

from collections.abc import Callable

StepListener = Callable[[str], None]
"""Told what begins, before it begins."""


def shown_task(task: str | None) -> str:
    """A task as a person reads it."""
    return "the bare model" if task is None else task
