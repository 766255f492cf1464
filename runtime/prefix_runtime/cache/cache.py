"""The keys and values of a batch's rows, as the decoding loop and the pool see them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from prefix_runtime.errors import ContextOverflowError, RequestError
from prefix_runtime.prefix.prefix import DECODER, Prefix


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

    def copy_from(self, other: Row) -> None:
        """Hold the same prefix, length and offset as another row."""
        self.prefix, self.length, self.offset = other.prefix, other.length, other.offset

    def begin(self) -> int:
        """Go back to where text begins, behind its prefix if it has one; returns the positions that are filled."""
        prefix = self.prefix
        self.length = prefix.length_at(DECODER) if prefix is not None else 0
        self.offset = prefix.position_base - self.length if prefix is not None else 0
        return self.length


class Cache(ABC):
    """The keys and values of some rows for every layer, run with a graph.

    A prompt is run into its row alone; decode steps run the first rows together.

    Attributes:
        capacity: positions of each row that there is room for.
        rows: what each holds.
        nbytes: of the keys and values.
        is_wanted: whether it is to be kept for another request.
    """

    is_seeded_at_once = False
    """Whether letting a row hold a prefix costs so little that any cache of the right size will do."""

    def __init__(self, rows: int, capacity: int, nbytes: int) -> None:
        self.capacity, self.nbytes = capacity, nbytes
        self.rows = tuple(Row() for _ in range(rows))
        self.is_wanted = True

    @abstractmethod
    def seed(self, row: int, prefix: Prefix | None) -> None:
        """Let a row hold a prefix, or none, and forget everything else."""

    def let_go(self, prefix: Prefix) -> bool:
        """Forget a prefix that rows hold; returns whether the cache is worth keeping."""
        if self.is_seeded_at_once:
            for row, held in enumerate(self.rows):
                if held.prefix is prefix:
                    self.seed(row, None)
        return self.is_seeded_at_once

    @abstractmethod
    def reset(self, row: int) -> None:
        """Forget all of a row but its prefix."""

    @abstractmethod
    def move(self, source: int, target: int) -> None:
        """Let a row go on in the place of another, which is over."""

    def fork(self, source: int, target: int, start: int) -> None:  # noqa: ARG002  # for caches that can
        """Let a row go on from where another one is, which goes on itself.

        Args:
            source: the other row.
            target: the row.
            start: positions at the beginning that both rows hold alike: only those behind them are copied.

        Raises:
            RequestError: the cache cannot copy rows.
        """
        raise RequestError(f"num_beams: expected 1, found more: {type(self).__name__} cannot copy rows")

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

    def choose(self, token_ids: Sequence[int], *, more: int) -> list[int]:  # noqa: ARG002  # some caches run ahead
        """Run a step as `step` does, and return the most likely next token of each row; of equal ones the first.

        Args:
            token_ids: one for each of the first rows.
            more: steps of the same rows that may follow.

        Raises:
            ContextOverflowError: there is no room in one of them.
        """
        chosen: list[int] = self.step(token_ids).argmax(1).tolist()
        return chosen

    def _check_room(self, held: Row, count: int) -> None:
        if held.length + count > self.capacity:
            raise ContextOverflowError(f"expected at most {self.capacity} positions, found {held.length + count}")
