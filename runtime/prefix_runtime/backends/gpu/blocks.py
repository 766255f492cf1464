"""Where pieces of a GPU's memory lie that are copied in one step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """Equally long pieces of memory, in equally long groups.

    Attributes:
        address: of the first piece.
        pitch: bytes from a piece to the next.
        height: pieces from a group to the next.
    """

    address: int
    pitch: int
    height: int
