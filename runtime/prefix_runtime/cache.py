"""The keys and values of a batch's rows, as the decoding loop and the pool see them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from .errors import ContextOverflowError
from .prefix import Prefix


class Row:
    """One row of a batch.

    Attributes:
        prefix: that it runs under.
        length: positions that are filled.
        offset: from there to the position of the next token of text.
    """

    def __init__(self) -> None:
        self.prefix: Prefix | None = None
        self.length = self.offset = 0

    @property
    def position(self) -> int:
        """The position of the next token of text."""
        return self.length + self.offset


class Cache(ABC):
    """The keys and values of some rows for every layer, run with a graph.

    A prompt is run into its row alone; decode steps run the first rows together.

    Attributes:
        capacity: positions of each row that there is room for.
        rows: what each holds.
        nbytes: of the keys and values.
        is_wanted: whether it is to be kept for another request.
    """

    def __init__(self, rows: int, capacity: int, nbytes: int) -> None:
        self.capacity, self.nbytes = capacity, nbytes
        self.rows = tuple(Row() for _ in range(rows))
        self.is_wanted = True

    @abstractmethod
    def seed(self, row: int, prefix: Prefix | None) -> None:
        """Let a row hold a prefix, or none, and forget everything else."""

    @abstractmethod
    def reset(self, row: int) -> None:
        """Forget all of a row but its prefix."""

    @abstractmethod
    def move(self, source: int, target: int) -> None:
        """Let a row go on in the place of another, which is over."""

    @abstractmethod
    def prefill(self, row: int, token_ids: Sequence[int], keep_all_logits: bool = False) -> np.ndarray:
        """Run a prompt and append its keys and values to a row.

        Returns the logits, float32: [vocab] of the last token, a view that the next run may overwrite; or, when all
        are kept, a new array [sequence, vocab].

        Raises:
            ContextOverflowError: there is no room.
        """

    @abstractmethod
    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Run one more token for each of the first rows and append their keys and values.

        Returns the logits [rows, vocab] float32, a view that the next run may overwrite.

        Raises:
            ContextOverflowError: there is no room in one of them.
        """

    def _check_room(self, held: Row, count: int) -> None:
        if held.length + count > self.capacity:
            raise ContextOverflowError(f"expected at most {self.capacity} positions, found {held.length + count}")
