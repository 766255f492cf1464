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

PRODUCT_COLOURS = {"product-float32": "#1f6f8b", "product-int8": "#3a9d8f", "product-int4": "#7fbf7b"}
FLOOR_COLOUR = "#888888"


def draw(report: dict[str, Any], names: list[str]) -> Figure:
    """Medians with their quartiles, and the floors of the precisions that are drawn."""
    figure, axes = plt.subplots(figsize=(10, 4.8), dpi=160)
    axes.set_prop_cycle(color=plt.colormaps["tab20"].colors)
    found = {name: report["contestants"][name] for name in names or measured(report)}
    for name, contestant in found.items():
        draw_line(axes, contestant, PRODUCT_COLOURS.get(name))
    for name in PRODUCT_COLOURS:
        if name in found:
            draw_floor(axes, found[name])
    title = f"{report['model']}, random weights, {report['machine']}"
    axes.set(xlabel="prefix length (positions)", ylabel="ms a token", ylim=(0, None), title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.06, 1), fontsize="small")
    figure.tight_layout()
    return figure


def measured(report: dict[str, Any]) -> list[str]:
    """Those with a line to draw."""
    return [name for name, row in report["contestants"].items() if len(row.get("lengths", ())) > 1]


def draw_line(axes: Axes, contestant: dict[str, Any], colour: str | None) -> None:
    """One contestant; in the next colour where none is given."""
    figures = {int(length): row["inter_token"] for length, row in contestant["lengths"].items()}
    lengths = sorted(figures)
    medians = [figures[length]["median"] * 1e3 for length in lengths]
    spread = [
        [(figures[length]["median"] - figures[length]["first"]) * 1e3 for length in lengths],
        [(figures[length]["third"] - figures[length]["median"]) * 1e3 for length in lengths],
    ]
    axes.errorbar(lengths, medians, spread, color=colour, marker="o", capsize=3, label=contestant["label"])
    axes.annotate(f"{medians[-1]:.1f}", (lengths[-1], medians[-1]), (6, 0), textcoords="offset points", va="center")


def draw_floor(axes: Axes, contestant: dict[str, Any]) -> None:
    """The time to read weights, prefix and text once."""
    floors = {int(length): row["floor"]["median"] * 1e3 for length, row in contestant["lengths"].items()}
    lengths = sorted(floors)
    label = f"reading what a {contestant['precision']} step reads"
    axes.plot(lengths, [floors[length] for length in lengths], "--", color=FLOOR_COLOUR, label=label)


def main() -> None:
    """Draw what the command line names."""
    report, picture, *names = sys.argv[1:]
    draw(json.loads(Path(report).read_text()), names).savefig(picture)


if __name__ == "__main__":
    main()
