"""The charts of a bench as a PNG image, drawn by matplotlib."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING

from prefix_runtime.bench.measurements import BenchReport, Comparison
from prefix_runtime.errors import BenchError

from .charts import BarChart, Chart, LineChart, Series, line_ticks, selection_chart, setting_charts
from .tables import setting_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#1b6c8f", "#b4511b", "#6a4a9c", "#4a7a2a")
_PANEL = (5.2, 3.9)  # inches
_COLUMNS = 3
_LEGEND_COLUMNS = 2
_DOTS_AN_INCH = 130
_MOST_LABEL = 22
_MARGIN = 0.04


def as_png(report: BenchReport, comparison: Comparison | None = None) -> bytes:
    """The charts of a report, with an optional comparison, as the bytes of a PNG file.

    Raises:
        BenchError: matplotlib is not installed; the message says how to install it.
    """
    check_library()
    from matplotlib.figure import Figure

    charts = _charts(report, comparison)
    rows = -(-len(charts) // _COLUMNS)
    size = (_PANEL[0] * _COLUMNS, _PANEL[1] * rows)
    figure = Figure(figsize=size, dpi=_DOTS_AN_INCH, layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in panels[len(charts) :]:
        axes.set_axis_off()
    for (chart, name), axes in zip(charts, panels, strict=False):
        _draw(chart, axes)
        axes.set_title(f"{chart.title}\n{name}", fontsize=10)
    figure.suptitle(f"{comparison.labels[0]} against {comparison.labels[1]}" if comparison else report.subject.label)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def check_library() -> None:
    """Check that matplotlib is installed.

    Raises:
        BenchError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("PNG: expected matplotlib, found none; pip install 'prefix-runtime[report]'")


def _charts(report: BenchReport, comparison: Comparison | None) -> list[tuple[Chart, str]]:
    """Every chart, with its setting or bundle."""
    charts = [
        (chart, setting_name(setting))
        for setting in report.settings
        for chart in setting_charts(report, setting, comparison)
    ]
    selection = selection_chart(report)
    return [*charts, (selection, report.subject.label)] if selection else charts


def _draw(chart: Chart, axes: Axes) -> None:
    if isinstance(chart, LineChart):
        _draw_lines(chart, axes)
    else:
        _draw_bars(chart, axes)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.get_legend_handles_labels()[0]:
        return
    # Below the chart, where it does not cover anything.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=_LEGEND_COLUMNS, frameon=False, fontsize=8)


def _draw_lines(chart: LineChart, axes: Axes) -> None:
    for series in chart.series:
        _draw_series(series, axes)
    x_ticks, y_ticks = line_ticks(chart)
    # Slightly beyond the ticks, so that no mark is cut in half.
    axes.set_xlim(-_MARGIN * x_ticks[-1], (1 + _MARGIN) * x_ticks[-1])
    axes.set_ylim((1 + _MARGIN) * y_ticks[0], y_ticks[-1] + _MARGIN * (y_ticks[-1] - y_ticks[0]))
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.axhline(0, color="#5d6a74", linewidth=0.8)
    axes.grid(visible=True, axis="y", color="#e3e7ea")
    axes.set_axisbelow(True)


def _draw_series(series: Series, axes: Axes) -> None:
    colour = _COLOURS[series.colour % len(_COLOURS)]
    x, y = [point.x for point in series.points], [point.y for point in series.points]
    if series.style == "dashed":
        axes.plot(x, y, color=colour, linestyle="--", marker="." if len(x) == 1 else "", label=series.name)
        return
    spread = [[point.y - point.low for point in series.points], [point.high - point.y for point in series.points]]
    line, marker, inside = ("-", "o", colour) if series.style == "line" else ("none", "D", "white")
    axes.errorbar(
        x,
        y,
        spread,
        color=colour,
        capsize=2,
        linestyle=line,
        marker=marker,
        markerfacecolor=inside,
        markersize=4,
        label=series.name,
    )


def _draw_bars(chart: BarChart, axes: Axes) -> None:
    labels = [name if len(name) <= _MOST_LABEL else f"{name[: _MOST_LABEL - 1]}…" for name in chart.categories]
    starts = [0.0] * len(labels)
    for (part, values), colour in zip(chart.parts, _COLOURS, strict=False):
        axes.barh(range(len(labels)), values, left=starts, color=colour, label=part)
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(chart.x_label)
