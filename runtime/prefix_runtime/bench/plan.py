"""Choose the rows of a bundle that a bench measures, and say why it skips others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.bundle.task_names import unknown_task
from prefix_runtime.errors import BenchError, UnknownTaskError
from prefix_runtime.prefix.geometry import LEAST_TEXT

from .request import MOST_TASKS, BenchRequest


@dataclass(frozen=True)
class BenchRow:
    """The prefix, prompt and batch of a row. `task` is a task of the bundle, or None for a random prefix or none."""

    task: str | None
    prefix_length: int
    prompt_length: int = 0
    batch_size: int = 0

    @property
    def prefix(self) -> str:
        """The row's prefix in words."""
        return f"task {self.task}" if self.task else f"prefix {self.prefix_length}"

    def __str__(self) -> str:
        return f"{self.prefix}, prompt {self.prompt_length}, batch {self.batch_size}"


@dataclass(frozen=True)
class BenchPlan:
    """The rows of one bundle to measure, the prefixes in them, and reasons why other rows are skipped."""

    bundle: Bundle
    rows: tuple[BenchRow, ...]
    prefixes: tuple[BenchRow, ...]
    skipped: tuple[str, ...]

    @property
    def selections(self) -> tuple[BenchRow, ...]:
        """The prefixes whose selection is measured; none for a baked bundle, whose graph holds them all the time."""
        return self.prefixes if self.bundle.manifest.mode == "feed" else ()


def plan_rows(bundle: Bundle, request: BenchRequest) -> BenchPlan:
    """The rows of a request that fit a bundle.

    Raises:
        BenchError: no row fits; the message gives the reasons.
        UnknownTaskError: the request names a task that the bundle does not have.
    """
    requested, unmeasured = _tasks(bundle, request)
    if bundle.manifest.mode == "bake":
        unmeasured.append("random prefixes and selecting a task: the graph holds its own prefixes")
    else:
        requested = [*(BenchRow(None, length) for length in request.prefix_lengths), *requested]
    room = {row: _room(bundle, row) for row in requested}
    limit = bundle.manifest.max_length
    fitting = [row for row in requested if room[row] >= LEAST_TEXT]
    skipped = [f"{row.prefix}: leaves no room for text in {limit} positions" for row in requested if row not in fitting]
    rows = []
    for row in _settings(fitting, request):
        if row.prompt_length + request.new_tokens <= room[BenchRow(row.task, row.prefix_length)]:
            rows.append(row)
        elif row.batch_size == request.batch_sizes[0]:
            skipped.append(
                f"{row.prefix}, prompt {row.prompt_length}: with {request.new_tokens} new tokens it does not fit "
                f"{limit} positions"
            )
    if not rows:
        raise BenchError(f"{bundle.root}: expected something that fits the bundle, found {'; '.join(skipped)}")
    return BenchPlan(bundle, tuple(rows), tuple(row for row in fitting if row.prefix_length), (*skipped, *unmeasured))


def _tasks(bundle: Bundle, request: BenchRequest) -> tuple[list[BenchRow], list[str]]:
    """The tasks to measure, and a line about the tasks that are skipped."""
    names = bundle.tasks[:MOST_TASKS] if request.tasks is None else request.tasks
    for name in names:
        if name not in bundle.manifest.tasks:
            raise UnknownTaskError(f"{bundle.root.name}: {unknown_task(name, bundle.tasks)}")
    left = len(bundle.tasks) - len(names) if request.tasks is None else 0
    lines = [f"{left} more tasks: only the first {MOST_TASKS} of a bundle are measured, unless you name others"]
    return [BenchRow(name, bundle.manifest.tasks[name].prefix_length) for name in names], lines[: bool(left)]


def _room(bundle: Bundle, row: BenchRow) -> int:
    """The number of text tokens that fit behind a row's prefix."""
    manifest = bundle.manifest
    base = manifest.tasks[row.task].position_base if row.task else row.prefix_length
    return min(manifest.max_length - row.prefix_length, manifest.geometry.context_length - base)


def _settings(prefixes: Sequence[BenchRow], request: BenchRequest) -> Iterator[BenchRow]:
    for batch_size in request.batch_sizes:
        for prompt_length in request.prompt_lengths:
            for row in prefixes:
                yield replace(row, prompt_length=prompt_length, batch_size=batch_size)
