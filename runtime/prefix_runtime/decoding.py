"""Prefill, then decode steps, until an end token or the limit."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .kv_cache import KeyValueCache
from .sampling import Sampler


@dataclass(frozen=True)
class Step:
    """One new token: its id, the seconds that it took, and whether it ends the text."""

    token_id: int
    seconds: float
    is_end: bool


def prefill(cache: KeyValueCache, prompt: Sequence[int]) -> np.ndarray:
    """The logits [vocab] after a prompt, whose keys and values are appended to the cache."""
    return cache.extend(np.asarray(prompt, np.int64))


def decode_step(cache: KeyValueCache, token_id: int) -> np.ndarray:
    """The logits [vocab] after one more token."""
    return cache.extend(np.array([token_id], np.int64))


def decode(
    cache: KeyValueCache, prompt: Sequence[int], sampler: Sampler, end_tokens: Collection[int], max_new_tokens: int
) -> Iterator[Step]:
    """New tokens one by one, until an end token or the `max_new_tokens`-th; the first one's time is the prefill's."""
    token_ids = list(prompt)
    for count in range(max_new_tokens):
        started = time.perf_counter()
        logits = decode_step(cache, token_ids[-1]) if count else prefill(cache, prompt)
        token_id = sampler(logits, token_ids)
        is_end = token_id in end_tokens
        yield Step(token_id, time.perf_counter() - started, is_end)
        if is_end:
            return
        token_ids.append(token_id)
