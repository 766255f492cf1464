"""Tables and lines of plain text that fit a width; a number or a path is never broken."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

_LEAST_FIRST_COLUMN = 8


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """A header, a rule and a line for each row; the first column is cut before the table gets wider than the width.

    If that does not suffice, each row is a block of lines, one line for each cell (`_as_blocks`).

    Args:
        header: the columns' names.
        rows: as many cells each; the first cell names its row.
        width: characters of a line at most.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    others = sum(widths[1:]) + 2 * len(widths[1:])
    if min(widths[0], _LEAST_FIRST_COLUMN) + others > width:
        return _as_blocks(header, rows, width)
    widths[0] = min(widths[0], width - others)
    lines = [_line(header, widths), "─" * (widths[0] + others)]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)])


def folded(text: str, width: int | None, indent: int = 0) -> str:
    """A line that is folded between words if it is longer than the width; None folds nothing."""
    if width is None or len(text) <= width:
        return text
    return textwrap.fill(
        text, max(width, indent + 1), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _as_blocks(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """`NAME OF THE ROW`, and below it `column: cell` for each cell that is not empty."""
    blocks = []
    for row in rows:
        cells = [f"  {name}: {cell}" for name, cell in zip(header[1:], row[1:], strict=True) if cell]
        blocks += [f"{header[0]} {row[0]}", *(folded(cell, width, indent=4) for cell in cells)]
    return "\n".join(blocks)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0] if len(row[0]) <= widths[0] else f"{row[0][: widths[0] - 1]}…"
    cells = [f"{first:<{widths[0]}}", *(f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()
