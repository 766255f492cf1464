"""Names of tasks: which are allowed, which are taken, and the errors for those that are not there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from prefix_runtime.checks import quoted
from prefix_runtime.errors import DuplicateTaskError, TaskNameError, UnknownTaskError

_TASK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}")
# Windows opens a device under these names, whatever the extension.
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_MOST_LISTED = 50
"""Tasks that a message lists."""


def check_task_name(name: str) -> None:
    """Refuse a name that cannot name a task, and so a file.

    Raises:
        TaskNameError: empty, absolute, with a separator or `..`, or with other characters than the portable ones.
    """
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise TaskNameError(
            f"task name: expected 1 to 64 letters, digits, '_', '-' or '.', beginning with a letter, digit or '_', "
            f"without '..' and not ending in '.', found {quoted(name)}"
        )


def check_new_task_name(name: str, taken: Iterable[str]) -> None:
    """Refuse a name that cannot be one, or that is taken, also by one that differs in case alone.

    Raises:
        TaskNameError: the name cannot name a task.
        DuplicateTaskError: the name is taken; remove that task first or choose another name.
    """
    check_free_task_name(name, {task_key(other): other for other in taken})


def check_free_task_name(name: str, taken: Mapping[str, str]) -> None:
    """Like `check_new_task_name`, for a caller that has the names by their `task_key`.

    Raises:
        TaskNameError: the name cannot name a task.
        DuplicateTaskError: the name is taken; remove that task first or choose another name.
    """
    check_usable_task_name(name)
    if (other := taken.get(task_key(name))) is not None:
        raise duplicate_task(name, other)


def check_usable_task_name(name: str) -> None:
    """Refuse a name that cannot be a new task's.

    Raises:
        TaskNameError: as `check_task_name`; or a name that Windows keeps for a device, whatever the extension.
    """
    check_task_name(name)
    if _DEVICE_NAME.fullmatch(task_key(name)):
        raise TaskNameError(
            f"task name: expected one that a file can have on Windows too, found {name!r}, which names a device there; "
            "choose another name"
        )


def task_key(name: str) -> str:
    """The key of a name. Names with one key are the same file on some file systems."""
    return name.lower()


def duplicate_task(name: str, other: str) -> DuplicateTaskError:
    """The error for a task whose name is taken by another."""
    return DuplicateTaskError(f"task {name!r}: there is already {other!r}; remove it first or choose another name")


def unknown_task(name: object, known: Iterable[str]) -> UnknownTaskError:
    """The error for an unknown task. It lists the first `_MOST_LISTED` tasks that there are."""
    names = sorted(known)
    listed = ", ".join(names[:_MOST_LISTED]) or "none"
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return UnknownTaskError(f"task {quoted(name)}: there is none of this name; tasks here: {listed}{more}")
