"""Where pieces of a GPU's memory lie that are copied in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


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

    def moved(self, nbytes: int) -> Self:
        """Pieces that begin so many bytes later."""
        return type(self)(self.address + nbytes, self.pitch, self.height) if nbytes else self
