"""The task store: which prefixes there are; loading them when they are first asked for; adding and removing."""

from __future__ import annotations

import threading
from collections import OrderedDict

from .bundle import Bundle
from .composition import SEPARATOR, concatenated
from .errors import CompositionError
from .manifest import check_new_task_name, unknown_task
from .prefix import Prefix

MOST_COMPOSED = 16
"""Compositions that are kept; unlike a task's own prefix they lie in memory, not in a file."""


class TaskStore:
    """The tasks of a running engine: those of its bundle, with what was added and removed since.

    A prefix is read when its task is first asked for. Its arrays are views of the mapped file, so the operating system
    takes their memory back when it is short; a thousand tasks cost address space, not memory. Safe to use from many
    threads.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._lock = threading.Lock()
        self._prefixes: dict[str, Prefix | None] = dict.fromkeys(bundle.tasks)
        self._composed: OrderedDict[str, Prefix] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, sorted."""
        with self._lock:
            return tuple(sorted(self._prefixes))

    def get(self, name: str) -> Prefix:
        """A task's prefix; the same object for as long as the task is there.

        Several names joined by `+` are their prefixes one after another (`composition.concatenated`); the last few of
        these are kept.

        Raises:
            UnknownTaskError: there is no such task; the message lists those that there are.
            PrefixError: its file is damaged.
            CompositionError, PrefixMismatchError: prefixes that do not go together, or leave no room for text.
        """
        if isinstance(name, str) and SEPARATOR in name:
            return self._compose(name)
        with self._lock:
            prefix = self._find(name)
        if prefix is not None:
            return prefix
        # Read without the lock: other tasks go on meanwhile. Two threads may read the same file; the first one's stays.
        loaded = self._bundle.prefix(name)
        with self._lock:
            if (prefix := self._find(name)) is None:
                self._prefixes[name] = prefix = loaded
        return prefix

    def holds(self, name: str, prefix: Prefix) -> bool:
        """Whether a task is there, with this very prefix."""
        with self._lock:
            return self._prefixes.get(name, self._composed.get(name)) is prefix

    def place(self, prefix: Prefix) -> int:
        """A prefix's place among the bundle's tasks, in the order of their names."""
        with self._lock:
            return next(index for index, name in enumerate(sorted(self._prefixes)) if self._prefixes[name] is prefix)

    def _compose(self, name: str) -> Prefix:
        with self._lock:
            if (kept := self._composed.get(name)) is not None:
                self._composed.move_to_end(name)
                return kept
        if self._bundle.manifest.mode == "bake":
            raise CompositionError(
                f"task {name!r}: expected one task a row, as the graph holds its prefixes, found several"
            )
        names = name.split(SEPARATOR)
        parts = [self.get(part) for part in names]
        try:
            prefix = concatenated(parts)
        except CompositionError as error:
            raise CompositionError(f"task {name!r}: {error}") from error
        self._bundle.check_prefix(prefix, f"task {name!r}")
        with self._lock:
            for part in names:
                self._find(part)  # it may have been removed meanwhile
            prefix = self._composed.setdefault(name, prefix)  # another thread may have been first
            while len(self._composed) > MOST_COMPOSED:
                self._composed.popitem(last=False)
        return prefix

    def _find(self, name: str) -> Prefix | None:
        try:
            return self._prefixes[name]
        except (KeyError, TypeError):
            raise unknown_task(name, self._prefixes) from None

    def add(self, name: str, prefix: Prefix) -> None:
        """Add a task.

        Raises:
            TaskNameError, DuplicateTaskError, PrefixMismatchError
            BundleError: the graph holds its prefixes.
        """
        self._bundle.check_tasks_may_change()
        self._bundle.check_prefix(prefix, f"task {name!r}")
        with self._lock:
            check_new_task_name(name, self._prefixes)
            self._prefixes[name] = prefix

    def remove(self, name: str) -> list[Prefix]:
        """Remove a task; returns its prefix if it had been read, and what it was composed to.

        Raises:
            UnknownTaskError: there is no such task.
            BundleError: the graph holds its prefixes.
        """
        self._bundle.check_tasks_may_change()
        with self._lock:
            prefix = self._find(name)
            del self._prefixes[name]
            gone = [composed for composed in self._composed if name in composed.split(SEPARATOR)]
            found = [self._composed.pop(composed) for composed in gone]
            return found if prefix is None else [prefix, *found]
