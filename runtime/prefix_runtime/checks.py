"""What a value given by a caller is: Python's truth values are numbers, and numpy's numbers are none of Python's."""

from __future__ import annotations

import math
from typing import TypeGuard

import numpy as np

MOST_QUOTED = 80
"""Characters of a value from outside that a message repeats."""


def is_whole(value: object, least: float = 0, most: float = math.inf) -> TypeGuard[int]:
    """Whether it is a whole number in a range; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(least <= value <= most)


def is_unicode(text: str) -> bool:
    """Whether it is Unicode text: bytes that are no UTF-8 become halves of characters on a command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_finite(value: object) -> bool:
    """Whether it is a number that is neither infinite nor undefined; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what floating point reaches
        return False


def quoted(value: object) -> str:
    """A value as a message shows it: of a text at most `MOST_QUOTED` characters, then an ellipsis."""
    if isinstance(value, str):
        return repr(value) if len(value) <= MOST_QUOTED else f"{value[:MOST_QUOTED]!r}…"
    shown = repr(value)
    return shown if len(shown) <= MOST_QUOTED else f"{shown[:MOST_QUOTED]}…"
