"""The loop of generation, on a cache that only writes down what it is asked."""

from __future__ import annotations

import numpy as np
import pytest

from prefix_runtime.generation.decoding import decode

VOCAB = 50


class Recorder:
    """A cache whose rows count on from their last token."""

    def __init__(self):
        self.asked = []

    def prefill(self, row, token_ids):
        self.asked.append(("prefill", row, list(token_ids)))
        return np.eye(VOCAB, dtype=np.float32)[token_ids[-1] + 1]

    def step(self, token_ids):
        self.asked.append(("step", list(token_ids)))
        return np.eye(VOCAB, dtype=np.float32)[np.array(token_ids) + 1]

    def choose(self, token_ids, *, more):
        self.asked.append(("choose", list(token_ids), more))
        return [token_id + 1 for token_id in token_ids]

    def move(self, source, target):
        self.asked.append(("move", source, target))


class Counting:
    """A generation that takes so many tokens, the most likely ones; greedy, it lets the cache choose them."""

    def __init__(self, prompt, tokens, is_greedy=False):
        self.prompt, self.tokens_left, self.is_greedy = prompt, tokens, is_greedy
        self.tokens, self.times = [], []

    @property
    def last_token(self):
        return self.tokens[-1]

    @property
    def is_finished(self):
        return self.tokens_left == 0

    def take(self, logits):
        self.accept(int(logits.argmax()))

    def accept(self, token_id):
        self.tokens_left -= 1
        self.tokens.append(token_id)

    def note_time(self, seconds):
        self.times.append(seconds)


def test_the_prompt_is_run_at_once_and_each_token_alone():
    cache, one = Recorder(), Counting([5, 6, 7], 3)
    assert list(decode(cache, [0], [one])) == [one] * 3
    assert one.tokens == [8, 9, 10]
    assert cache.asked == [("prefill", 0, [5, 6, 7]), ("step", [8]), ("step", [9])]


def test_nothing_is_run_before_it_is_asked_for():
    cache = Recorder()
    steps = decode(cache, [0], [Counting([5], 3)])
    assert cache.asked == []
    next(steps)
    assert cache.asked == [("prefill", 0, [5])]


def test_rows_are_decoded_together():
    cache, generations = Recorder(), [Counting([5], 2), Counting([20, 21], 2)]
    list(decode(cache, [0, 1], generations))
    assert cache.asked == [("prefill", 0, [5]), ("prefill", 1, [20, 21]), ("step", [6, 22])]


def test_a_generation_runs_in_the_row_that_holds_its_prefix():
    cache, generations = Recorder(), [Counting([5], 2), Counting([20], 2)]
    list(decode(cache, [1, 0], generations))
    assert cache.asked == [("prefill", 0, [20]), ("prefill", 1, [5]), ("step", [21, 6])]
    assert [generation.tokens for generation in generations] == [[6, 7], [21, 22]]


def test_the_last_row_takes_the_place_of_one_that_has_finished():
    cache, generations = Recorder(), [Counting([5], 1), Counting([20], 3), Counting([30], 3)]
    list(decode(cache, [0, 1, 2], generations))
    assert cache.asked[3:] == [("move", 2, 0), ("step", [31, 21]), ("step", [32, 22])]


def test_a_row_at_the_end_leaves_without_a_move():
    cache, generations = Recorder(), [Counting([5], 3), Counting([20], 1), Counting([30], 1)]
    list(decode(cache, [0, 1, 2], generations))
    assert cache.asked[3:] == [("step", [6]), ("step", [7])]


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 2, 3, 4), (4, 3, 2, 1), (2, 7, 1, 7, 3), (5, 1, 1, 1, 5)])
def test_every_row_gets_its_own_tokens_whoever_leaves_first(counts):
    generations = [Counting([10 * row], count) for row, count in enumerate(counts)]
    order = np.random.default_rng(0).permutation(len(counts)).tolist()
    given = list(decode(Recorder(), order, generations))
    for row, (generation, count) in enumerate(zip(generations, counts, strict=True)):
        assert generation.tokens == [10 * row + 1 + index for index in range(count)]
        assert given.count(generation) == count


def test_tokens_are_chosen_where_the_logits_are_while_all_rows_are_greedy():
    cache, generations = Recorder(), [Counting([5], 4, is_greedy=True), Counting([20], 2)]
    list(decode(cache, [0, 1], generations))
    assert cache.asked[2:] == [("step", [6, 21]), ("choose", [7], 1), ("choose", [8], 0)]
    assert [generation.tokens for generation in generations] == [[6, 7, 8, 9], [21, 22]]


def test_a_cache_is_told_when_a_row_is_about_to_leave():
    cache, generations = Recorder(), [Counting([5], 4, is_greedy=True), Counting([20], 3, is_greedy=True)]
    list(decode(cache, [0, 1], generations))
    assert cache.asked[2:] == [("choose", [6, 21], 1), ("choose", [7, 22], 0), ("choose", [8], 0)]


def test_time_goes_on():
    one, two = Counting([5], 3), Counting([6], 3)
    list(decode(Recorder(), [0, 1], [one, two]))
    assert np.diff([0, *one.times]).min() > 0
    assert two.times[0] > one.times[0]
    assert two.times[1:] == one.times[1:]
