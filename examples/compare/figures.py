"""Figures with their spread, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PASSES = ("first request", "later requests")
"""Over tasks asked for in turn, as workers name them."""


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The `first` quartile, the `median` and the `third`."""
    found = np.percentile(values, (25, 50, 75))
    return dict(zip(("first", "median", "third"), map(float, found), strict=True))


def show(figure: dict[str, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    """`median [first, third]`, scaled; a dash where there is none."""
    if figure is None:
        return "—"
    median, first, third = (f"{figure[key] * scale:.{digits}f}" for key in ("median", "first", "third"))
    return f"{median} [{first}, {third}]"


def alike(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that two answers begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, pair in pairs if pair[0] != pair[1]), min(len(left), len(right)))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Its lines."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]
