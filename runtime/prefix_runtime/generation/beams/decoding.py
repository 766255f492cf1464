"""The loop of a beam search: prefill, then decode steps of all beams, until every request has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from prefix_runtime.cache.cache import Cache

from .search import Fork


class Search(Protocol):
    """The beam search of one request; see `BeamSearch`."""

    next_tokens: list[int]
    is_finished: bool

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids."""

    @property
    def width(self) -> int:
        """The number of slots. Each takes a row."""

    def advance(self, logits: Sequence[np.ndarray]) -> Sequence[Fork]:
        """Choose the next beams by the logits [vocab] float32 of each slot; returns the copies to make."""

    def note_time(self, seconds: float) -> None:
        """Record how many seconds the batch needed up to the newest tokens."""


class _Running:
    """A search and its rows, one for each slot.

    Args:
        cache: the cache with the rows.
        search: a search that has not begun.
        rows: rows that hold the prefix and no text.
    """

    def __init__(self, cache: Cache, search: Search, rows: list[int]) -> None:
        self.search, self.rows = search, rows
        self._cache = cache
        self._start = cache.rows[rows[0]].length

    def begin(self) -> None:
        """Run the prompt once and copy it to all rows."""
        first, *others = self.rows
        logits = self._cache.prefill(first, self.search.prompt)
        for row in others:
            self._cache.fork(first, row, self._start)
        self._advance([logits])

    def go_on(self, logits: np.ndarray) -> None:
        """Choose the next beams by the logits [rows, vocab] of a step."""
        self._advance([logits[row] for row in self.rows])

    def _advance(self, logits: Sequence[np.ndarray]) -> None:
        for fork in self.search.advance(logits):
            self._cache.fork(self.rows[fork.source], self.rows[fork.target], self._start + fork.shared)


def search_beams(cache: Cache, rows: Sequence[int], searches: Sequence[Search]) -> Iterator[Search]:
    """Run searches together, one row for each slot; yields each search after each of its steps.

    When a search has finished, rows of the others move into its places, because a step runs the first rows of a cache.

    Args:
        cache: its first rows hold the prefixes of the searches, one row for each slot.
        rows: the row of each slot of each search, a permutation of the first rows.
        searches: searches that have not begun.
    """
    seconds = 0.0
    left = iter(rows)
    running = [_Running(cache, search, [next(left) for _ in range(search.width)]) for search in searches]
    for each in running:
        started = time.perf_counter()
        each.begin()
        seconds += time.perf_counter() - started
        each.search.note_time(seconds)
        yield each.search
    while running := _close_gaps(cache, running):
        started = time.perf_counter()
        _step(cache, running)
        seconds += time.perf_counter() - started
        for each in running:
            each.search.note_time(seconds)
            yield each.search


def _step(cache: Cache, running: Sequence[_Running]) -> None:
    tokens = {row: token for each in running for row, token in zip(each.rows, each.search.next_tokens, strict=True)}
    logits = cache.step([tokens[row] for row in range(len(tokens))])
    for each in running:
        each.go_on(logits)


def _close_gaps(cache: Cache, running: Sequence[_Running]) -> list[_Running]:
    """The searches that continue, with their rows moved to the first places."""
    going_on = [each for each in running if not each.search.is_finished]
    taken = {row for each in going_on for row in each.rows}
    free = (row for row in range(len(taken)) if row not in taken)
    for each in going_on:
        for slot, row in enumerate(each.rows):
            if row >= len(taken):
                each.rows[slot] = next(free)
                cache.move(row, each.rows[slot])
    return going_on
