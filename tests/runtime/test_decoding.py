"""The loop of generation, on a cache that only writes down what it is asked."""

from __future__ import annotations

import numpy as np
import pytest

from prefix_runtime.decoding import decode

PROMPT = (5, 6, 7)


class Recorder:
    """A cache whose logits name the next token, one after the other."""

    def __init__(self, *tokens):
        self.tokens = iter(tokens)
        self.extended = []

    def extend(self, token_ids):
        assert token_ids.dtype == np.int64
        self.extended.append(token_ids.tolist())
        return np.eye(10, dtype=np.float32)[next(self.tokens)]


def greedy(logits, _):
    return int(logits.argmax())


def test_the_prompt_is_run_at_once_and_each_token_alone():
    cache = Recorder(1, 2, 3)
    steps = list(decode(cache, PROMPT, greedy, (), 3))
    assert [step.token_id for step in steps] == [1, 2, 3]
    assert cache.extended == [[5, 6, 7], [1], [2]]


def test_nothing_is_run_before_it_is_asked_for():
    cache = Recorder(1, 2, 3)
    steps = decode(cache, PROMPT, greedy, (), 3)
    assert cache.extended == []
    next(steps)
    assert cache.extended == [[5, 6, 7]]


@pytest.mark.parametrize(("ends", "tokens"), [((3,), [1, 2, 3]), ((1,), [1]), ((2, 3), [1, 2]), ((), [1, 2, 3, 4])])
def test_an_end_token_ends_it_and_is_given(ends, tokens):
    steps = list(decode(Recorder(1, 2, 3, 4), PROMPT, greedy, ends, 4))
    assert [step.token_id for step in steps] == tokens
    assert [step.is_end for step in steps] == [token in ends for token in tokens]


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_no_more_tokens_come_than_were_asked_for(limit):
    cache = Recorder(*range(9))
    assert len(list(decode(cache, PROMPT, greedy, (), limit))) == limit
    assert len(cache.extended) == limit


def test_the_sampler_sees_the_prompt_and_the_text_so_far():
    seen = []

    def sampler(logits, token_ids):
        seen.append(list(token_ids))
        return greedy(logits, token_ids)

    list(decode(Recorder(1, 2, 3), PROMPT, sampler, (), 3))
    assert seen == [[5, 6, 7], [5, 6, 7, 1], [5, 6, 7, 1, 2]]


def test_an_end_token_of_the_prompt_does_not_end_it():
    steps = list(decode(Recorder(1, 2), PROMPT, greedy, {5, 7}, 2))
    assert [step.token_id for step in steps] == [1, 2]


def test_every_step_takes_time():
    assert all(step.seconds > 0 for step in decode(Recorder(1, 2, 3), PROMPT, greedy, (), 3))
