"""The task store: which prefixes there are; loading them when they are first asked for; adding and removing."""

from __future__ import annotations

import threading

from .bundle import Bundle
from .manifest import check_new_task_name, unknown_task
from .prefix import Prefix


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

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, sorted."""
        with self._lock:
            return tuple(sorted(self._prefixes))

    def get(self, name: str) -> Prefix:
        """A task's prefix; the same object for as long as the task is there.

        Raises:
            UnknownTaskError: there is no such task; the message lists those that there are.
            PrefixError: its file is damaged.
        """
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
            return self._prefixes.get(name) is prefix

    def place(self, prefix: Prefix) -> int:
        """A prefix's place among the bundle's tasks, in the order of their names."""
        with self._lock:
            return next(index for index, name in enumerate(sorted(self._prefixes)) if self._prefixes[name] is prefix)

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

    def remove(self, name: str) -> Prefix | None:
        """Remove a task; returns its prefix if it had been read.

        Raises:
            UnknownTaskError: there is no such task.
            BundleError: the graph holds its prefixes.
        """
        self._bundle.check_tasks_may_change()
        with self._lock:
            prefix = self._find(name)
            del self._prefixes[name]
            return prefix
