"""The measurements of a bench, and the figures that are computed from them.

All units are seconds and bytes. Every row has one sample per round, in the order of the rounds. So two rows can be
compared round by round, and a disturbance of the machine slows both.
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
"""Bytes of one key or value, by the type of the cache."""

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Quartiles:
    """A median with its spread."""

    first: float
    median: float
    third: float


@dataclass(frozen=True)
class Ratio:
    """A median of ratios with its 95 % confidence interval; the interval is None with too few rounds."""

    median: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Sample:
    """One generation of a row.

    Attributes:
        task_selection: seconds to find the prefix and a buffer that holds it.
        time_to_first_token: seconds until every row of the batch has its first token, including the selection.
        first_step: seconds of the first decode step.
        inter_token_latency: median seconds of a decode step.
        tokens_per_second: new tokens of the whole batch, divided by the seconds of the call.
    """

    task_selection: float
    time_to_first_token: float
    first_step: float
    inter_token_latency: float
    tokens_per_second: float

    @property
    def prefill(self) -> float:
        """Seconds to the first token without the task's selection."""
        return self.time_to_first_token - self.task_selection


@dataclass(frozen=True)
class Cell:
    """The measurements for one prefix, prompt length and batch size.

    Attributes:
        task: a task of the bundle; None for a random prefix, or for no prefix if the length is 0.
        prefix_length: positions of the prefix.
        prompt_length: tokens of the prompt.
        batch_size: rows that decode together.
        samples: one sample for each round.
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
        """Prompt length and batch size; only rows with the same setting are compared."""
        return self.prompt_length, self.batch_size

    @property
    def key(self) -> tuple[str | None, int, int, int]:
        """Identifies the same row in another report."""
        return self.task, self.prefix_length, self.prompt_length, self.batch_size

    def figure(self, name: str) -> list[float]:
        """The values of a figure, one for each round; `name` is a field of `Sample`."""
        return [getattr(sample, name) for sample in self.samples]

    def quartiles(self, name: str) -> Quartiles:
        """The quartiles of a figure; `name` is a field of `Sample`."""
        return quartiles(self.figure(name))


@dataclass(frozen=True)
class Switch:
    """Seconds to select a task in each round: `cold` for its first request in an engine, `warm` for a later one.

    A cold selection reads the prefix (of a task of the bundle), makes a buffer and copies the prefix into it.
    """

    task: str | None
    prefix_length: int
    cold: tuple[float, ...]
    warm: tuple[float, ...]

    @property
    def label(self) -> str:
        """See `Cell.label`."""
        return self.task or str(self.prefix_length)


@dataclass(frozen=True)
class Opening:
    """The measurements of a fresh process that opened the bundle and ran one row.

    Attributes:
        task: see `Cell`.
        prefix_length: see `Cell`.
        prompt_length: see `Cell`.
        batch_size: see `Cell`.
        import_seconds: seconds to import the module.
        open_seconds: seconds to open the bundle with `load`.
        opened_bytes: memory of the process after opening; None if the system does not report it.
        generated_bytes: peak memory of the process up to the end of the row, or None.
        resident_bytes: memory of the process after the row, or None.
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
        """See `Cell.key`."""
        return self.task, self.prefix_length, self.prompt_length, self.batch_size


@dataclass(frozen=True)
class Subject:
    """The measured bundle.

    Attributes:
        name: the name of its folder.
        model: the model's name in the manifest.
        precision: the precision of the weights.
        cache: the type of cached keys and values: "fp32", "fp16", "bf16" or "int8".
        weight_bytes: bytes of weights that one decode step reads.
        values_per_position: numbers in the keys and values of one position, all layers together.
    """

    name: str
    model: str
    precision: str
    cache: str
    weight_bytes: int
    values_per_position: int

    @classmethod
    def of(cls, bundle: Bundle) -> Subject:
        """The description of a bundle."""
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
        """Bytes of keys and values that attention reads for one row with this number of past positions."""
        return positions * self.values_per_position * BYTES_PER_VALUE[self.cache]


@dataclass(frozen=True)
class Floor:
    """Seconds to read the weights once, and the keys and values of every row, at the machine's bandwidth."""

    weights: float
    key_values: float

    @property
    def seconds(self) -> float:
        """The sum of both."""
        return self.weights + self.key_values


@dataclass(frozen=True)
class BenchReport:
    """All measurements of a bench.

    Attributes:
        command: the command, without folders.
        created: date and time, ISO 8601, UTC.
        versions: versions of the runtime and its libraries, by name.
        machine: the processor, the number of usable processors, and the system, by these names. "gpu" if one ran the
            graph; "graph" if the runtime opened a packed copy.
        subject: the bundle.
        request: the options.
        bandwidth: the machine's read bandwidth in bytes per second, one value for each round.
        cells: the rows, by batch size, prompt length and prefix length; tasks of the bundle come last.
        switches: selections of a task, by prefix length.
        openings: openings by fresh processes in order; each row at least once.
        skipped: one line for each row that does not fit, with the reason.
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
        """All pairs of prompt length and batch size, each once."""
        return list(dict.fromkeys(cell.setting for cell in self.cells))

    def cells_of(self, setting: tuple[int, int]) -> list[Cell]:
        """The rows of one prompt length and batch size."""
        return [cell for cell in self.cells if cell.setting == setting]

    def find(self, key: tuple[str | None, int, int, int]) -> Cell | None:
        """The row with a `Cell.key`; None if there is none."""
        return self._by_key.get(key)

    def peak_bytes(self, cell: Cell) -> int | None:
        """The largest peak memory of fresh processes that ran a row; None if the system does not report it."""
        peaks = [opening.generated_bytes for opening in self.openings if opening.key == cell.key]
        return max((each for each in peaks if each is not None), default=None)

    def open_seconds(self, cell: Cell) -> float | None:
        """The median seconds to open the bundle, of fresh processes that ran a row; None if there were none."""
        seconds = [opening.open_seconds for opening in self.openings if opening.key == cell.key]
        return quartiles(seconds).median if seconds else None

    def switch(self, cell: Cell) -> Switch | None:
        """The selection of a row's task; None if it was not measured."""
        return next((each for each in self.switches if (each.task, each.prefix_length) == cell.key[:2]), None)

    @cached_property
    def _by_key(self) -> dict[tuple[str | None, int, int, int], Cell]:
        return {cell.key: cell for cell in self.cells}

    def overhead(self, cell: Cell, figure: str) -> Ratio | None:
        """A figure of a row over the bare model's, round by round; None for the bare model, or without its row."""
        bare = self.find((None, 0, *cell.setting))
        return None if bare is None or bare is cell else paired_ratio(cell.figure(figure), bare.figure(figure))

    @property
    def bytes_per_second(self) -> float:
        """The median bandwidth of the rounds, in which the other figures were measured too."""
        return quartiles(self.bandwidth).median

    def step_floor(self, cell: Cell) -> Floor:
        """The floor of the decode step in the middle of a row's generation; a batch reads the weights once."""
        return self._floor(cell, cell.prefix_length + cell.prompt_length + self.request.new_tokens / 2)

    def first_token_floor(self, cell: Cell) -> Floor:
        """The floor of a prefill, which has to read the weights and the prefix even for a short prompt."""
        return self._floor(cell, cell.prefix_length)

    def most_tokens_per_second(self, cell: Cell) -> float:
        """New tokens per second of a row's whole batch if every step took exactly its floor."""
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
        report: the first report.
        against: the report to compare with.
        interleaved: whether both were measured in the same rounds; otherwise the machine may have changed in between.
    """

    report: BenchReport
    against: BenchReport
    interleaved: bool

    @property
    def labels(self) -> tuple[str, str]:
        """A name for each: model and precision, and also the folder if those are equal."""
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
        """A figure of the report over the other's: round by round if interleaved, otherwise of the medians."""
        if self.interleaved:
            return paired_ratio(cell.figure(figure), other.figure(figure))
        return Ratio(cell.quartiles(figure).median / other.quartiles(figure).median, None)


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of one or more values."""
    return Quartiles(*(float(value) for value in np.percentile(values, (25, 50, 75))))


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """The median of the ratios of two rows' figures, round by round, with an interval of that median.

    The interval's ends are two of the sorted ratios: the innermost pair that contains the median with a probability of
    at least 95 %, for any distribution. It needs six rounds. Source: David & Nagaraja, "Order Statistics", 2003,
    section 7.1.
    """
    ratios = np.sort(np.divide(over, under))
    count, outside, place = len(ratios), 0.0, -1
    # Each ratio is below the median with probability 1/2: `outside` is the probability that at most `place` are.
    while (outside := outside + math.comb(count, place + 1) / 2**count) <= (1 - _CONFIDENCE) / 2:
        place += 1
    interval = (float(ratios[place]), float(ratios[count - 1 - place])) if place >= 0 else None
    return Ratio(float(np.median(ratios)), interval)
