"""Prefill, then decode steps, until every row of a batch has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Protocol

import numpy as np

from prefix_runtime.cache.cache import Cache

from .sampling import log_softmax


class Generation(Protocol):
    """A row's answer as it grows."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids."""

    @property
    def last_token(self) -> int:
        """The newest token's id."""

    @property
    def is_finished(self) -> bool:
        """Whether there is no more to come."""

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the one of the largest logit."""

    @property
    def tokens_left(self) -> int:
        """New tokens that may come, at most, before it ends or `is_greedy` changes."""

    def take(self, logits: np.ndarray) -> None:
        """Choose the next token by its logits [vocab] float32, which are left as they are."""

    def accept(self, token_id: int) -> None:
        """Go on with a token that was chosen."""

    def note_time(self, seconds: float) -> None:
        """Seconds that went by, in this batch, until the newest token was there."""


def decode(cache: Cache, rows: Sequence[int], generations: Sequence[Generation]) -> Iterator[Generation]:
    """Run generations together, each prefilled into its row; gives each one back after each of its tokens.

    What the caller does in between is not part of the seconds. A row leaves when it has finished: the last one takes
    its place, so that those that go on stay the first of the batch.

    Args:
        cache: whose first rows hold the generations' prefixes.
        rows: of each generation, a permutation of the first ones.
        generations: none of them begun.
    """
    seconds = 0.0
    active: list[Generation] = [
        generation for _, generation in sorted(zip(rows, generations, strict=True), key=itemgetter(0))
    ]
    for row, generation in enumerate(active):
        started = time.perf_counter()
        generation.take(cache.prefill(row, generation.prompt))
        seconds += time.perf_counter() - started
        generation.note_time(seconds)
        yield generation
    while _leave(cache, active):
        started = time.perf_counter()
        _step(cache, active)
        seconds += time.perf_counter() - started
        for generation in active:
            generation.note_time(seconds)
        yield from active


def target_logprobs(cache: Cache, prompt: Sequence[int], target: Sequence[int]) -> tuple[float, ...]:
    """The log-probability of each token of a target behind a prompt, run in the first row."""
    logprobs = [float(log_softmax(cache.prefill(0, prompt))[target[0]])]
    if len(target) > 1:
        logits = cache.prefill(0, target[:-1], keep_all_logits=True)
        logprobs += [float(log_softmax(row)[token_id]) for row, token_id in zip(logits, target[1:], strict=True)]
    return tuple(logprobs)


def _step(cache: Cache, active: Sequence[Generation]) -> None:
    """One more token for each row. If all rows take the largest logit, the cache chooses where the logits are."""
    tokens = [generation.last_token for generation in active]
    if all(generation.is_greedy for generation in active):
        more = min(generation.tokens_left for generation in active) - 1
        for generation, token_id in zip(active, cache.choose(tokens, more=more), strict=True):
            generation.accept(token_id)
        return
    for generation, logits in zip(active, cache.step(tokens), strict=True):
        generation.take(logits)


def _leave(cache: Cache, active: list[Generation]) -> bool:
    """Take finished rows out; returns whether any is left."""
    for row in reversed(range(len(active))):
        if active[row].is_finished:
            last = active.pop()
            if row < len(active):
                cache.move(len(active), row)
                active[row] = last
    return bool(active)
