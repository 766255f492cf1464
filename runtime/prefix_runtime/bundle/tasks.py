"""The task store: which prefixes there are; loading them when they are first asked for; adding and removing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prefix_runtime.checks import quoted
from prefix_runtime.errors import CompositionError
from prefix_runtime.prefix.composition import SEPARATOR, concatenated
from prefix_runtime.prefix.prefix import Prefix

from .folder import Bundle
from .task_names import check_usable_task_name, duplicate_task, task_key, unknown_task

MOST_COMPOSED = 16
"""Compositions that are kept."""
MOST_PARTS = 64
"""Tasks in one name."""
_LONGEST_NAME = MOST_PARTS * (64 + len(SEPARATOR))
"""Characters of a name; one task's has at most 64."""


class _Task(NamedTuple):
    """A task; its prefix is None until it is read."""

    name: str
    prefix: Prefix | None


@dataclass(frozen=True, eq=False)
class _Composition:
    """Prefixes that were made one, and the tasks' own prefixes that it was made of, by name."""

    prefix: Prefix
    parts: Mapping[str, Prefix]


class TaskStore:
    """The tasks of a running engine: those of its bundle, with what was added and removed since.

    A prefix is read into memory when its task is first asked for. Safe to use from many threads.

    Each change is one operation of a dictionary, so an interrupt finds the old state or the new. What a collected
    stream calls, `holds`, takes no lock: its thread may hold one.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._lock = threading.Lock()
        self._tasks = {task_key(name): _Task(name, None) for name in bundle.tasks}
        self._composed: OrderedDict[str, _Composition] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, sorted. Takes no lock."""
        return tuple(sorted(task.name for task in list(self._tasks.values())))

    def get(self, name: str) -> Prefix:
        """A task's prefix; the same object for as long as the task is there.

        Several names joined by `+`, at most `MOST_PARTS`, are their prefixes one after another
        (`composition.concatenated`); the last few of these are kept.

        Raises:
            UnknownTaskError: there is no such task; the message lists those that there are.
            PrefixError: its file is damaged.
            CompositionError, PrefixMismatchError: prefixes that do not go together, or leave no room for text.
        """
        if isinstance(name, str) and SEPARATOR in name:
            return self._compose(name)
        if (prefix := self._find(name).prefix) is not None:
            return prefix
        # Read without the lock: other tasks go on meanwhile. Two threads may read the same file; the first one's stays.
        loaded = self._bundle.prefix(name)
        with self._lock:
            if (prefix := self._find(name).prefix) is None:
                self._tasks[task_key(name)] = _Task(name, loaded)
                return loaded
        return prefix

    def holds(self, name: str, prefix: Prefix) -> bool:
        """Whether a task is there, with this very prefix. Takes no lock."""
        composed = self._composed.get(name)
        if composed is not None:
            return composed.prefix is prefix and self._is_current(composed)
        return self._has(name, prefix)

    def place(self, prefix: Prefix) -> int:
        """A prefix's place among the bundle's tasks, in the order of their names."""
        with self._lock:
            tasks = sorted(self._tasks.values(), key=lambda task: task.name)
            return next(index for index, task in enumerate(tasks) if task.prefix is prefix)

    def _compose(self, name: str) -> Prefix:
        names = self._parts(name)
        while True:
            with self._lock:
                if (kept := self._kept(name)) is not None:
                    return kept
            made = self._made(name, names)
            with self._lock:
                if (kept := self._kept(name)) is not None:  # another thread was faster
                    return kept
                # Else one of its tasks was removed or replaced meanwhile.
                if self._is_current(made):
                    self._composed[name] = made
                    while len(self._composed) > MOST_COMPOSED:
                        self._composed.popitem(last=False)
                    return made.prefix

    def _parts(self, name: str) -> list[str]:
        """The tasks in a name, before anything is made of them."""
        count = name.count(SEPARATOR) + 1
        if count > MOST_PARTS or len(name) > _LONGEST_NAME:
            raise CompositionError(
                f"task {quoted(name)}: expected at most {MOST_PARTS} tasks joined by {SEPARATOR!r}, in at most "
                f"{_LONGEST_NAME} characters, found {count} in {len(name)}"
            )
        if self._bundle.manifest.mode == "bake":
            raise CompositionError(
                f"task {quoted(name)}: expected one task a row, as the graph holds its prefixes, found several"
            )
        return name.split(SEPARATOR)

    def _made(self, name: str, names: Sequence[str]) -> _Composition:
        prefixes = [self.get(part) for part in names]
        where = f"task {quoted(name)}"
        self._bundle.check_length(prefixes, where)  # before anything of that length is made
        try:
            prefix = concatenated(prefixes)
        except CompositionError as error:
            raise CompositionError(f"{where}: {error}") from error
        self._bundle.check_prefix(prefix, where)
        return _Composition(prefix, dict(zip(names, prefixes, strict=True)))

    def _kept(self, name: str) -> Prefix | None:
        kept = self._composed.get(name)
        if kept is None or not self._is_current(kept):
            return None
        self._composed.move_to_end(name)
        return kept.prefix

    def _is_current(self, composed: _Composition) -> bool:
        return all(self._has(name, prefix) for name, prefix in composed.parts.items())

    def _has(self, name: str, prefix: Prefix) -> bool:
        task = self._tasks.get(task_key(name))
        return task is not None and task.name == name and task.prefix is prefix

    def _find(self, name: str) -> _Task:
        task = self._tasks.get(task_key(name)) if isinstance(name, str) else None
        if task is None or task.name != name:
            raise unknown_task(name, self.names)
        return task

    def add(self, name: str, prefix: Prefix) -> None:
        """Add a task.

        Raises:
            TaskNameError, DuplicateTaskError, PrefixMismatchError
            BundleError: the graph holds its prefixes.
        """
        self._bundle.check_tasks_may_change()
        self._bundle.check_prefix(prefix, f"task {quoted(name)}")
        check_usable_task_name(name)
        with self._lock:
            if (other := self._tasks.get(task_key(name))) is not None:
                raise duplicate_task(name, other.name)
            self._tasks[task_key(name)] = _Task(name, prefix)

    def remove(self, name: str) -> list[Prefix]:
        """Remove a task; returns its prefix if it had been read, and what it was composed to.

        Raises:
            UnknownTaskError: there is no such task.
            BundleError: the graph holds its prefixes.
        """
        self._bundle.check_tasks_may_change()
        with self._lock:
            task = self._find(name)
            del self._tasks[task_key(name)]
            gone = [composed for composed, made in self._composed.items() if name in made.parts]
            compositions = [self._composed.pop(composed).prefix for composed in gone]
        return compositions if task.prefix is None else [task.prefix, *compositions]
