"""The charts of a bench, independent of the drawing library. They show milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from prefix_runtime.bench.measurements import BenchReport, Cell, Comparison, Quartiles, Switch, quartiles

from .tables import milliseconds, row_name

PREFIX_LENGTH = "prefix length (positions)"
_TASKS = "tasks of the bundle"
_TICKS = 5
_Row = TypeVar("_Row", Cell, Switch)


@dataclass(frozen=True)
class Point:
    """A value with its spread, and a description."""

    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        name: the name in the legend.
        colour: the index of the colour, from 0.
        style: "line" joins and marks the points, "dashed" only joins them, "marks" only marks them.
        points: the points, by ascending x.
    """

    name: str
    colour: int
    style: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class LineChart:
    """Series over a common x axis; the y axis includes 0."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class BarChart:
    """A stacked bar for each category; each part has a name and one value for every category."""

    title: str
    x_label: str
    categories: tuple[str, ...]
    parts: tuple[tuple[str, tuple[float, ...]], ...]


Chart = LineChart | BarChart


def setting_charts(report: BenchReport, setting: tuple[int, int], comparison: Comparison | None = None) -> list[Chart]:
    """The charts of one prompt length and batch size."""
    drawn = [("", report)]
    if comparison:
        drawn = list(zip(comparison.labels, (comparison.report, comparison.against), strict=True))
    charts: list[Chart] = [
        _latency("Inter-token latency", "inter_token_latency", drawn, setting),
        _latency("Time to first token", "time_to_first_token", drawn, setting),
    ]
    if any(each.overhead(cell, "inter_token_latency") for _, each in drawn for cell in each.cells_of(setting)):
        charts.append(_overhead(drawn, setting))
    for name, each in drawn:
        if cells := each.cells_of(setting):
            charts += [_first_token(name, cells), _step(name, each, cells)]
    return charts


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in about five steps that cover the range from `low` to `high`."""
    span = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * _TICKS >= span)
    return [step * index for index in range(math.floor(low / step), math.ceil((low + span) / step) + 1)]


def line_ticks(chart: LineChart) -> tuple[list[float], list[float]]:
    """The ticks of both axes, around all points and their spread."""
    points = [point for series in chart.series for point in series.points]
    # Positions are whole numbers: a smaller range would have fractions as ticks.
    x = ticks(0, max([_TICKS, *(point.x for point in points)]))
    return x, ticks(min([0.0, *(point.low for point in points)]), max([0.0, *(point.high for point in points)]))


def selection_chart(report: BenchReport) -> LineChart | None:
    """The cost of selecting a task, cold and warm; None if no row has a prefix."""
    if not report.switches:
        return None
    kinds = (("cold: a task's first request", "cold"), ("warm: later requests", "warm"))
    series: list[Series] = []
    for colour, (name, kind) in enumerate(kinds):
        series += _both((name, f"{name}, {_TASKS}"), colour, report.switches, partial(_switch_points, kind=kind))
    return LineChart("Selecting a task", PREFIX_LENGTH, "milliseconds", _drawn(series))


def _latency(title: str, figure: str, drawn: list[tuple[str, BenchReport]], setting: tuple[int, int]) -> LineChart:
    series: list[Series] = []
    for colour, (name, report) in enumerate(drawn):
        cells = report.cells_of(setting)
        names = _named("random prefixes", name), _named(_TASKS, name)
        series += [
            *_both(names, colour, cells, partial(_points, figure=figure)),
            Series(_named("floor", name), colour, "dashed", tuple(_floor_points(report, cells, figure))),
        ]
    return LineChart(title, PREFIX_LENGTH, "milliseconds", _drawn(series))


def _overhead(drawn: list[tuple[str, BenchReport]], setting: tuple[int, int]) -> LineChart:
    figures = (("a token", "inter_token_latency"), ("to the first token", "time_to_first_token"))
    series: list[Series] = []
    for number, (name, report) in enumerate(drawn):
        cells = sorted(report.cells_of(setting), key=lambda cell: cell.prefix_length)
        for place, (shown, figure) in enumerate(figures):
            names = _named(shown, name), _named(f"{shown}, {_TASKS}", name)
            points = partial(_overhead_points, report, figure=figure)
            series += _both(names, number * len(figures) + place, cells, points)
    return LineChart("Overhead against prefix 0, 95 % interval", PREFIX_LENGTH, "percent", _drawn(series))


def _first_token(name: str, cells: list[Cell]) -> BarChart:
    parts = (("selection of the task", "task_selection"), ("prefill", "prefill"), ("first decode step", "first_step"))
    return BarChart(
        _named("First token and first step", name),
        "milliseconds",
        tuple(map(row_name, cells)),
        tuple((shown, tuple(cell.quartiles(figure).median * 1e3 for cell in cells)) for shown, figure in parts),
    )


def _step(name: str, report: BenchReport, cells: list[Cell]) -> BarChart:
    floors = [report.step_floor(cell) for cell in cells]
    medians = [cell.quartiles("inter_token_latency").median for cell in cells]
    # A step faster than the floor leaves no rest, because a bar cannot be negative.
    rest = (max(0.0, median - floor.seconds) for median, floor in zip(medians, floors, strict=True))
    return BarChart(
        _named("A decode step", name),
        "milliseconds",
        tuple(map(row_name, cells)),
        (
            ("floor: reading weights", tuple(floor.weights * 1e3 for floor in floors)),
            ("floor: reading keys and values", tuple(floor.key_values * 1e3 for floor in floors)),
            ("rest", tuple(seconds * 1e3 for seconds in rest)),
        ),
    )


def _both(
    names: tuple[str, str], colour: int, rows: Iterable[_Row], points: Callable[[Iterable[_Row]], Iterable[Point]]
) -> list[Series]:
    """Random prefixes as a line over their length, and the bundle's tasks as marks."""
    listed = list(rows)
    plain = sorted((row for row in listed if not row.task), key=lambda row: row.prefix_length)
    tasks = [row for row in listed if row.task]
    return [
        Series(names[0], colour, "line", tuple(points(plain))),
        Series(names[1], colour, "marks", tuple(points(tasks))),
    ]


def _drawn(series: Iterable[Series]) -> tuple[Series, ...]:
    """The series that have points."""
    return tuple(each for each in series if each.points)


def _named(content: str, name: str) -> str:
    return f"{content}, {name}" if name else content


def _points(cells: Iterable[Cell], figure: str) -> Iterable[Point]:
    for cell in cells:
        yield _point(cell.prefix_length, cell.quartiles(figure), f"prefix {row_name(cell)}")


def _switch_points(switches: Iterable[Switch], kind: str) -> Iterable[Point]:
    for switch in switches:
        yield _point(switch.prefix_length, quartiles(getattr(switch, kind)), f"prefix {row_name(switch)}")


def _floor_points(report: BenchReport, cells: Iterable[Cell], figure: str) -> Iterable[Point]:
    floor_of = report.step_floor if figure == "inter_token_latency" else report.first_token_floor
    floors = {cell.prefix_length: floor_of(cell).seconds for cell in cells}
    for length, seconds in sorted(floors.items()):
        yield _point(length, Quartiles(seconds, seconds, seconds), f"floor of prefix {length}")


def _point(length: int, spread: Quartiles, text: str) -> Point:
    shown = f"{text}: {milliseconds(spread.median)} ms [{milliseconds(spread.first)}, {milliseconds(spread.third)}]"
    return Point(length, spread.median * 1e3, spread.first * 1e3, spread.third * 1e3, shown)


def _overhead_points(report: BenchReport, cells: Iterable[Cell], figure: str) -> Iterable[Point]:
    for cell in cells:
        if ratio := report.overhead(cell, figure):
            low, high = ratio.interval or (ratio.median, ratio.median)
            y, bottom, top = ((value - 1) * 100 for value in (ratio.median, low, high))
            yield Point(
                cell.prefix_length, y, bottom, top, f"prefix {row_name(cell)}: {y:+.1f} % [{bottom:+.1f}, {top:+.1f}]"
            )
