"""What a bench measured, as values; figures that follow from these are computed here.

Seconds and bytes throughout. Every row keeps one sample a round, in the order of the rounds, so that two rows can be
compared round by round: what slows the machine for a while slows both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from prefix_runtime.bundle.folder import Bundle

from .request import BenchRequest

BYTES_PER_VALUE = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Of keys and values, by the type of their buffers."""

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Quartiles:
    """A median with its spread."""

    first: float
    median: float
    third: float


@dataclass(frozen=True)
class Ratio:
    """A median of ratios with its 95 % confidence interval, None where there are too few rounds for one."""

    median: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Sample:
    """One generation of a row.

    Attributes:
        task_selection: seconds to find the prefix and a buffer that holds it.
        time_to_first_token: seconds, until every row of the batch has its first token; the selection is part of it.
        first_step: seconds of the first decode step.
        inter_token_latency: seconds of a decode step, the median.
        tokens_per_second: new tokens of the whole batch over the seconds that the call took.
    """

    task_selection: float
    time_to_first_token: float
    first_step: float
    inter_token_latency: float
    tokens_per_second: float

    @property
    def prefill(self) -> float:
        """Seconds of the time to first token that are not the task's selection."""
        return self.time_to_first_token - self.task_selection


@dataclass(frozen=True)
class Cell:
    """What was measured for one prefix, prompt length and batch size.

    Attributes:
        task: of the bundle, or None: a random prefix, or no prefix where its length is 0.
        prefix_length: positions.
        prompt_length: tokens.
        batch_size: rows.
        samples: one a round.
    """

    task: str | None
    prefix_length: int
    prompt_length: int
    batch_size: int
    samples: tuple[Sample, ...]

    @property
    def label(self) -> str:
        """The row's name: its task, or its prefix length."""
        return self.task or str(self.prefix_length)

    @property
    def setting(self) -> tuple[int, int]:
        """What it shares with the rows that it is compared with: prompt length and batch size."""
        return self.prompt_length, self.batch_size

    @property
    def key(self) -> tuple[str | None, int, int, int]:
        """What finds the same row in another report."""
        return self.task, self.prefix_length, self.prompt_length, self.batch_size

    def figure(self, name: str) -> list[float]:
        """One of the samples' figures, by its name, a round each."""
        return [getattr(sample, name) for sample in self.samples]

    def quartiles(self, name: str) -> Quartiles:
        """The quartiles of one of the samples' figures."""
        return quartiles(self.figure(name))


@dataclass(frozen=True)
class Switch:
    """Seconds to select a task, a sample a round: `cold`, its first request in an engine, and `warm`, a later one.

    A cold selection reads the prefix where it is a task of the bundle, makes a buffer and copies the prefix into it.
    """

    task: str | None
    prefix_length: int
    cold: tuple[float, ...]
    warm: tuple[float, ...]

    @property
    def label(self) -> str:
        """As `Cell.label`."""
        return self.task or str(self.prefix_length)


@dataclass(frozen=True)
class Opening:
    """A fresh process that opened the bundle and ran one row.

    Attributes:
        task, prefix_length, prompt_length, batch_size: of the row; see `Cell`.
        import_seconds: to import the module.
        open_seconds: to open the bundle: `load`.
        opened_bytes: of the process that are in memory then; None where the system does not tell.
        generated_bytes: that were in memory at once, at the most, up to the row's end.
        resident_bytes: that are in memory after the row.
    """

    task: str | None
    prefix_length: int
    prompt_length: int
    batch_size: int
    import_seconds: float
    open_seconds: float
    opened_bytes: int | None
    generated_bytes: int | None
    resident_bytes: int | None

    @property
    def key(self) -> tuple[str | None, int, int, int]:
        """As `Cell.key`."""
        return self.task, self.prefix_length, self.prompt_length, self.batch_size


@dataclass(frozen=True)
class Subject:
    """The bundle that was measured.

    Attributes:
        name: of its folder.
        model: as the manifest names it.
        precision: of the weights.
        cache: the type of the key/value buffers: "fp32", "fp16", "bf16" or "int8".
        weight_bytes: that one decode step reads.
        values_per_position: numbers in the keys and values of one position, all layers.
    """

    name: str
    model: str
    precision: str
    cache: str
    weight_bytes: int
    values_per_position: int

    @classmethod
    def of(cls, bundle: Bundle) -> Subject:
        """A bundle, as it is measured."""
        manifest = bundle.manifest
        return cls(
            name=bundle.root.resolve().name,
            model=manifest.model.name,
            precision=manifest.precision,
            cache=manifest.cache,
            weight_bytes=manifest.weight_bytes,
            values_per_position=manifest.geometry.values_per_position,
        )

    @property
    def label(self) -> str:
        """Model and precision."""
        return f"{self.model} {self.precision}" + (f", {self.cache} keys and values" if self.cache != "fp32" else "")

    def key_value_bytes(self, positions: float) -> float:
        """Bytes that attention reads for one row with so many positions behind it."""
        return positions * self.values_per_position * BYTES_PER_VALUE[self.cache]


@dataclass(frozen=True)
class Floor:
    """Seconds that reading takes at the machine's bandwidth: the weights once, keys and values of every row."""

    weights: float
    key_values: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.weights + self.key_values


@dataclass(frozen=True)
class BenchReport:
    """Everything that a bench measured.

    Attributes:
        command: that made it, without folders.
        created: date and time, ISO 8601, UTC.
        versions: of the runtime and what it runs on, by name.
        machine: processor, number of processors that may be used, and system, by these names; "gpu", where one ran;
            "graph", where what was opened had been kept there as onnxruntime packs it.
        subject: the bundle.
        request: what was asked for.
        bandwidth: bytes a second that the machine read memory at, one a round.
        cells: the rows, by batch size, prompt length, prefix length; tasks of the bundle last.
        switches: selection of a task, by prefix length.
        openings: of the bundle by fresh processes, the first one first; each row at least once.
        skipped: what does not fit, a line each with the reason.
    """

    command: str
    created: str
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    subject: Subject
    request: BenchRequest
    bandwidth: tuple[float, ...]
    cells: tuple[Cell, ...]
    switches: tuple[Switch, ...]
    openings: tuple[Opening, ...]
    skipped: tuple[str, ...] = field(default=())

    @property
    def settings(self) -> list[tuple[int, int]]:
        """Prompt length and batch size of the rows, each pair once."""
        return list(dict.fromkeys(cell.setting for cell in self.cells))

    def cells_of(self, setting: tuple[int, int]) -> list[Cell]:
        """The rows of one prompt length and batch size."""
        return [cell for cell in self.cells if cell.setting == setting]

    def find(self, key: tuple[str | None, int, int, int]) -> Cell | None:
        """The row of a `Cell.key`."""
        return self._by_key.get(key)

    def peak_bytes(self, cell: Cell) -> int | None:
        """The most memory that a fresh process took to run a row; None where the system does not tell."""
        peaks = [opening.generated_bytes for opening in self.openings if opening.key == cell.key]
        return max((each for each in peaks if each is not None), default=None)

    def open_seconds(self, cell: Cell) -> float | None:
        """The median of what fresh processes that ran a row took to open the bundle."""
        seconds = [opening.open_seconds for opening in self.openings if opening.key == cell.key]
        return quartiles(seconds).median if seconds else None

    def switch(self, cell: Cell) -> Switch | None:
        """The selection of a row's task; None where none was measured."""
        return next((each for each in self.switches if (each.task, each.prefix_length) == cell.key[:2]), None)

    @cached_property
    def _by_key(self) -> dict[tuple[str | None, int, int, int], Cell]:
        return {cell.key: cell for cell in self.cells}

    def overhead(self, cell: Cell, figure: str) -> Ratio | None:
        """A figure of a row over the bare model's, round by round; None for that itself, or where it has no row."""
        bare = self.find((None, 0, *cell.setting))
        return None if bare is None or bare is cell else paired_ratio(cell.figure(figure), bare.figure(figure))

    @property
    def bytes_per_second(self) -> float:
        """The bandwidth: the median of the rounds, as every other figure, so that both saw the same machine."""
        return quartiles(self.bandwidth).median

    def step_floor(self, cell: Cell) -> Floor:
        """Of the decode step in the middle of a row's generation; a batch reads the weights once."""
        return self._floor(cell, cell.prefix_length + cell.prompt_length + self.request.new_tokens / 2)

    def first_token_floor(self, cell: Cell) -> Floor:
        """Of a prefill: the weights and the prefix have to be read, however short the prompt."""
        return self._floor(cell, cell.prefix_length)

    def most_tokens_per_second(self, cell: Cell) -> float:
        """New tokens a second of a row's whole batch, if every step took its floor."""
        steps = self.request.new_tokens - 1
        seconds = self.first_token_floor(cell).seconds + steps * self.step_floor(cell).seconds
        return cell.batch_size * self.request.new_tokens / seconds

    def _floor(self, cell: Cell, positions: float) -> Floor:
        read = cell.batch_size * self.subject.key_value_bytes(positions)
        return Floor(self.subject.weight_bytes / self.bytes_per_second, read / self.bytes_per_second)


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side.

    Attributes:
        report: that is looked at.
        against: that it is compared with.
        interleaved: whether their rows were measured in the same rounds; else the machine may have changed between.
    """

    report: BenchReport
    against: BenchReport
    interleaved: bool

    @property
    def labels(self) -> tuple[str, str]:
        """A name for each, by model and precision where these tell them apart, else by folder too."""
        first, second = self.report.subject, self.against.subject
        if first.label != second.label:
            return first.label, second.label
        if first.name != second.name:
            return f"{first.name}, {first.label}", f"{second.name}, {second.label}"
        return f"{first.label}, this run", f"{second.label}, the other"

    @property
    def cells(self) -> list[tuple[Cell, Cell]]:
        """The rows that both have."""
        pairs = ((cell, self.against.find(cell.key)) for cell in self.report.cells)
        return [(cell, other) for cell, other in pairs if other]

    def ratio(self, cell: Cell, other: Cell, figure: str) -> Ratio:
        """A figure of the report over the other's: round by round if they were interleaved, else of the medians."""
        if self.interleaved:
            return paired_ratio(cell.figure(figure), other.figure(figure))
        return Ratio(cell.quartiles(figure).median / other.quartiles(figure).median, None)


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of one or more figures."""
    return Quartiles(*(float(value) for value in np.percentile(values, (25, 50, 75))))


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """The median of the ratios of two rows' figures, round by round, with an interval of that median.

    The interval lies between two of the sorted ratios, the innermost pair that holds the median with a probability of
    95 % or more, whatever the ratios' distribution; it takes six rounds. Source: David & Nagaraja, "Order Statistics",
    2003, section 7.1.
    """
    ratios = np.sort(np.divide(over, under))
    count, outside, place = len(ratios), 0.0, -1
    # As many coins fall on one side as ratios lie below the median: `outside` is the chance of `place` or fewer.
    while (outside := outside + math.comb(count, place + 1) / 2**count) <= (1 - _CONFIDENCE) / 2:
        place += 1
    interval = (float(ratios[place]), float(ratios[count - 1 - place])) if place >= 0 else None
    return Ratio(float(np.median(ratios)), interval)
