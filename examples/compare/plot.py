"""Inter-token latency against prefix length, drawn from a report of `run.py`.

    python examples/compare/plot.py REPORT.json PICTURE.png [PEER ...]

Draws the peers that are named, or else all that were measured at two prefix lengths or more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

PRODUCT_COLOURS = {"product-float32": "#08519c", "product-int8": "#3182bd", "product-int4": "#6baed6"}
FLOOR_COLOUR = "#888888"
LABEL_GAP = 1.085
"""From a label to the next above it, on the logarithmic axis."""


def draw(report: dict[str, Any], names: list[str]) -> Figure:
    """Medians with their quartiles, and the floors of the precisions that are drawn."""
    figure, axes = plt.subplots(figsize=(10, 5.6), dpi=160)
    axes.set_prop_cycle(color=plt.colormaps["Dark2"].colors + plt.colormaps["tab10"].colors)
    found = {name: report["contestants"][name] for name in names or measured(report)}
    lines = [draw_line(axes, contestant, PRODUCT_COLOURS.get(name)) for name, contestant in found.items()]
    lines += [draw_floor(axes, found[name]) for name in PRODUCT_COLOURS if name in found]
    label_ends(axes, lines)
    title = f"{report['model']}, random weights, {report['machine']}"
    axes.set(xlabel="prefix length (positions)", ylabel="ms a token, logarithmic", yscale="log", title=title)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def measured(report: dict[str, Any]) -> list[str]:
    """Those with a line to draw."""
    return [name for name, row in report["contestants"].items() if len(row.get("lengths", ())) > 1]


def draw_line(axes: Axes, contestant: dict[str, Any], colour: str | None) -> Line2D:
    """One contestant; in the next colour where none is given."""
    lengths, figures = by_length(contestant, "inter_token")
    medians = [figure["median"] * 1e3 for figure in figures]
    spread = [
        [(figure["median"] - figure["first"]) * 1e3 for figure in figures],
        [(figure["third"] - figure["median"]) * 1e3 for figure in figures],
    ]
    label = f"{contestant['label']}: {medians[-1]:.1f}"
    line: Line2D = axes.errorbar(lengths, medians, spread, color=colour, marker="o", capsize=3).lines[0]
    line.set_label(label)
    return line


def draw_floor(axes: Axes, contestant: dict[str, Any]) -> Line2D:
    """The time to read weights, prefix and text once."""
    lengths, figures = by_length(contestant, "floor")
    medians = [figure["median"] * 1e3 for figure in figures]
    label = f"reading what a step in {contestant['precision']} reads: {medians[-1]:.1f}"
    return axes.plot(lengths, medians, "--", color=FLOOR_COLOUR, label=label)[0]


def by_length(contestant: dict[str, Any], field: str) -> tuple[list[int], list[dict[str, float]]]:
    """Prefix lengths in order, and a figure at each."""
    figures = {int(length): row[field] for length, row in contestant["lengths"].items()}
    return sorted(figures), [figures[length] for length in sorted(figures)]


def label_ends(axes: Axes, lines: list[Line2D]) -> None:
    """Name each line behind its end, the names apart from each other."""
    below = 0.0
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1]):
        x, y = line.get_xdata()[-1], line.get_ydata()[-1]
        below = max(y, below * LABEL_GAP)
        style = {"textcoords": "offset points", "va": "center", "color": line.get_color(), "fontsize": "small"}
        axes.annotate(line.get_label() or "", (x, below), (8, 0), annotation_clip=False, **style)


def main() -> None:
    """Draw what the command line names."""
    report, picture, *names = sys.argv[1:]
    draw(json.loads(Path(report).read_text()), names).savefig(picture)


if __name__ == "__main__":
    main()
