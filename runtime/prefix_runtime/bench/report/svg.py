"""Charts as SVG, for an HTML page whose style sheet defines the colours `--c0`, `--c1` and so on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from .charts import BarChart, Chart, LineChart, Series, line_ticks, ticks

WIDTH = 560
COLOURS = 4
_HEIGHT = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 44
_LABELS = 150
_BAR, _GAP = 18, 8
_MOST_LABEL = 22


def draw(chart: Chart, name: str) -> str:
    """A chart as an `svg` element; `name` makes its ids unique on the page."""
    if isinstance(chart, LineChart):
        height, inside = _HEIGHT, _lines(chart)
    else:
        height, inside = _bars_height(chart), _bars(chart)
    head = (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(chart.title)}</title><desc id="{name}-desc">{escape(describe(chart))}</desc>'
    )
    return "\n".join([head, *inside, "</svg>"])


def describe(chart: Chart) -> str:
    """A chart in words."""
    if isinstance(chart, LineChart):
        shown = "; ".join(f"{each.name}: {', '.join(point.text for point in each.points)}" for each in chart.series)
        return f"{chart.y_label} over {chart.x_label}. {shown}"
    rows = [
        f"{category}: " + ", ".join(f"{part} {values[index]:.3g}" for part, values in chart.parts)
        for index, category in enumerate(chart.categories)
    ]
    return f"{chart.x_label} by prefix. {'; '.join(rows)}"


def legend(chart: Chart) -> list[tuple[str, str]]:
    """The legend of a chart: name and CSS class of each entry."""
    if isinstance(chart, LineChart):
        return [(each.name, f"c{each.colour % COLOURS} {each.style}") for each in chart.series]
    return [(part, f"c{index % COLOURS} bar") for index, (part, _) in enumerate(chart.parts)]


class _Scale:
    """Maps a value to its coordinate in the image."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._factor = (end - start) / (high - low or 1.0)

    def __call__(self, value: float) -> str:
        return f"{self._start + (value - self._low) * self._factor:.1f}"


def _lines(chart: LineChart) -> Iterator[str]:
    x_ticks, y_ticks = line_ticks(chart)
    x = _Scale(0, x_ticks[-1], _LEFT, WIDTH - _RIGHT)
    y = _Scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    for value in y_ticks:
        kind = "axis" if value == 0 else "grid"
        yield f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(value)}" y2="{y(value)}"/>'
        yield f'<text class="end" x="{_LEFT - 8}" y="{y(value)}" dy="0.32em">{_number(value)}</text>'
    for value in x_ticks:
        yield f'<text class="middle" x="{x(value)}" y="{_HEIGHT - _BOTTOM + 18}">{_number(value)}</text>'
    yield _x_label(chart.x_label, (_LEFT + WIDTH - _RIGHT) / 2, _HEIGHT)
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    yield f'<text class="middle" transform="translate(14 {middle}) rotate(-90)">{escape(chart.y_label)}</text>'
    for series in chart.series:
        yield from _series(series, x, y)


def _series(series: Series, x: _Scale, y: _Scale) -> Iterator[str]:
    yield f'<g class="c{series.colour % COLOURS} {series.style}">'
    if series.style != "marks" and len(series.points) > 1:
        path = " ".join(f"{x(point.x)},{y(point.y)}" for point in series.points)
        yield f'<polyline points="{path}"/>'
    for point in series.points if series.style != "dashed" else ():
        at, height = x(point.x), y(point.y)
        yield f'<line x1="{at}" x2="{at}" y1="{y(point.low)}" y2="{y(point.high)}"/>'
        mark = f'<circle cx="{at}" cy="{height}" r="3.5">' if series.style == "line" else _diamond(at, height)
        yield f"{mark}<title>{escape(point.text)}</title></{'circle' if series.style == 'line' else 'path'}>"
    if series.style == "dashed" and len(series.points) == 1:
        yield f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(series.points[0].y)}" y2="{y(series.points[0].y)}"/>'
    yield "</g>"


def _diamond(x: str, y: str) -> str:
    return f'<path transform="translate({x} {y})" d="M0,-6 L6,0 L0,6 L-6,0 Z">'


def _bars_height(chart: BarChart) -> int:
    return _TOP + len(chart.categories) * (_BAR + _GAP) + _BOTTOM


def _bars(chart: BarChart) -> Iterator[str]:
    height = _bars_height(chart)
    sums = [sum(values[index] for _, values in chart.parts) for index in range(len(chart.categories))]
    x_ticks = ticks(0, max(sums))
    x = _Scale(0, x_ticks[-1], _LABELS, WIDTH - _RIGHT)
    for value in x_ticks:
        yield f'<line class="grid" x1="{x(value)}" x2="{x(value)}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
        yield f'<text class="middle" x="{x(value)}" y="{height - _BOTTOM + 18}">{_number(value)}</text>'
    yield _x_label(chart.x_label, (_LABELS + WIDTH - _RIGHT) / 2, height)
    for index, category in enumerate(chart.categories):
        top = _TOP + _GAP / 2 + index * (_BAR + _GAP)
        label = category if len(category) <= _MOST_LABEL else f"{category[: _MOST_LABEL - 1]}…"
        yield f'<text class="end" x="{_LABELS - 8}" y="{top + _BAR / 2}" dy="0.32em">{escape(label)}</text>'
        yield from _bar(chart.parts, index, top, x)


def _bar(parts: Sequence[tuple[str, Sequence[float]]], index: int, top: float, x: _Scale) -> Iterable[str]:
    start = 0.0
    for number, (part, values) in enumerate(parts):
        left, right = float(x(start)), float(x(start + values[index]))
        start += values[index]
        yield (
            f'<rect class="c{number % COLOURS} bar" x="{left:.1f}" y="{top}" width="{right - left:.1f}" '
            f'height="{_BAR}"><title>{escape(part)}: {values[index]:.3g}</title></rect>'
        )


def _x_label(text: str, x: float, height: int) -> str:
    return f'<text class="middle" x="{x}" y="{height - 6}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:.6g}"
