"""What changes the logits against transformers' own processors, in transformers' own order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prefix_runtime import GenerationDefaults
from prefix_runtime.generation.logits_processors import LogitsProcessors, Step

torch = pytest.importorskip("torch", reason="what is expected comes from torch")
transformers = pytest.importorskip("transformers", reason="what is expected comes from transformers")
logits_processors = pytest.importorskip("prefix_export.models.generation_defaults").logits_processors

VOCAB_SIZE = 60
ENDS = [7, 59]
SEEN = [3, 3, 17, 42, 0, 59, 3, 17, 3, 17, 42]
NEW_TOKENS = 8

CASES = {
    "repetition_penalty": [{"repetition_penalty": 1.7}, {"repetition_penalty": 0.4}],
    "encoder_repetition_penalty": [{"encoder_repetition_penalty": 1.7}],
    "sequence_bias": [
        {"sequence_bias": [[[5], 3.5], [[17, 42], -9.0], [[3, 17, 42, 6], 20.0], [[17, 42, 5], 1.0]]},
        {"sequence_bias": [[[5], 3.5], [[5], -3.5], [[42, 5], float("-inf")]]},
    ],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": size} for size in (1, 2, 3, 40)],
    "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": size} for size in (1, 2, 3, 40)],
    "bad_words_ids": [{"bad_words_ids": [[5], [17, 42], [42, 9], [7], [7, 7], list(range(50))]}],
    "min_length": [{"min_length": length} for length in (1, 9, 13, 100)],
    "min_new_tokens": [{"min_new_tokens": 0}, {"min_new_tokens": 3}, {"min_new_tokens": 2, "min_length": 100}],
    "forced_bos_token_id": [{"forced_bos_token_id": 5}],
    "forced_eos_token_id": [{"forced_eos_token_id": 7}, {"forced_eos_token_id": [9, 8]}],
    "exponential_decay_length_penalty": [
        {"exponential_decay_length_penalty": [2, 1.7]},
        {"exponential_decay_length_penalty": [0, 0.5], "min_new_tokens": 3},
        {"exponential_decay_length_penalty": [1, 2.0], "remove_invalid_values": True, "min_length": 100},
    ],
    "suppress_tokens": [{"suppress_tokens": [3, 5, 17, 61]}],
    "begin_suppress_tokens": [
        {"begin_suppress_tokens": [3, 5, 61]},
        {"begin_suppress_tokens": [5, 6], "forced_bos_token_id": 9},
    ],
    "remove_invalid_values": [{"remove_invalid_values": True, "bad_words_ids": [[5]]}],
    "several": [
        {
            "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[9], [42, 3]], "min_new_tokens": 2,
            "suppress_tokens": [1], "begin_suppress_tokens": [2], "forced_eos_token_id": 7,
            "exponential_decay_length_penalty": [1, 1.5], "encoder_repetition_penalty": 0.8,
            "sequence_bias": [[[3], -1.0]],
        }
    ],
}  # fmt: skip


def logits(seed, spread=3):
    return np.random.default_rng(seed).normal(scale=spread, size=VOCAB_SIZE).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    config = transformers.GPT2Config(
        n_embd=4, n_head=1, n_layer=1, vocab_size=VOCAB_SIZE, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config)


def pair(model, settings, seen, prompt_length, scores):
    """Scores [vocab] by transformers and by the runtime."""
    settings = {"eos_token_id": ENDS, **settings}
    prompt, text = torch.tensor([seen[:prompt_length]]), torch.tensor([seen])
    processors = logits_processors(model, transformers.GenerationConfig(**settings), prompt, NEW_TOKENS)
    expected = processors(text, torch.tensor(scores.copy())[None])[0].numpy()
    if "exponential_decay_length_penalty" in settings:
        # What leaves float32 in transformers stays its largest number here, so that it can be sampled.
        expected = np.where(np.isposinf(expected), np.finfo(np.float32).max, expected)
    own = LogitsProcessors(GenerationDefaults.of_config(settings, VOCAB_SIZE), VOCAB_SIZE)
    return expected, own(scores, Step(np.array(seen), prompt_length, NEW_TOKENS))


@pytest.mark.parametrize("settings", [case for cases in CASES.values() for case in cases], ids=str)
@pytest.mark.parametrize("prompt_length", [1, 3])
def test_scores_are_those_of_transformers_at_every_place(model, settings, prompt_length):
    for length in range(prompt_length, prompt_length + NEW_TOKENS):
        expected, found = pair(model, settings, SEEN[:length], prompt_length, logits(length))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


@given(
    seed=st.integers(0, 2**32),
    text=st.lists(st.integers(0, 5), min_size=3, max_size=9),
    settings=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.floats(0.5, 3),
            "no_repeat_ngram_size": st.integers(1, 4),
            "encoder_no_repeat_ngram_size": st.integers(1, 3),
            "bad_words_ids": st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=4),
            "min_length": st.integers(0, 12),
            "suppress_tokens": st.lists(st.integers(0, 70), max_size=4),
            "begin_suppress_tokens": st.lists(st.integers(0, 70), max_size=4),
            "forced_eos_token_id": st.integers(10, 20),
            "remove_invalid_values": st.booleans(),
            "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(0.5, 3)).map(list),
        },
    ),
)
def test_any_settings_together_give_the_scores_of_transformers(model, seed, text, settings):
    # Both refuse these; test_generation_config.py has it.
    assume(settings.get("forced_eos_token_id") not in settings.get("suppress_tokens", []))
    expected, found = pair(model, settings, text, 3, logits(seed))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("settings", [case for cases in CASES.values() for case in cases], ids=str)
@pytest.mark.parametrize("prompt_length", [1, 3])
def test_where_rules_are_idle_they_change_nothing(model, settings, prompt_length):
    rules = LogitsProcessors(GenerationDefaults.of_config({"eos_token_id": ENDS, **settings}, VOCAB_SIZE), VOCAB_SIZE)
    lengths = range(prompt_length, prompt_length + NEW_TOKENS)
    for length in lengths:
        idle = rules.idle(Step(np.array(SEEN[:length]), prompt_length, NEW_TOKENS))
        assert idle >= 0
        for later in range(length, min(length + idle, lengths.stop)):
            expected, _ = pair(model, settings, SEEN[:later], prompt_length, logits(later))
            np.testing.assert_array_equal(expected, logits(later))


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, [8, 7, 6, 5, 4, 3, 2, 1]),
        ({"suppress_tokens": [3]}, [0] * 8),
        ({"begin_suppress_tokens": [3]}, [0, 7, 6, 5, 4, 3, 2, 1]),
        ({"min_new_tokens": 3}, [0, 0, 0, 5, 4, 3, 2, 1]),
        ({"forced_eos_token_id": 3}, [7, 6, 5, 4, 3, 2, 1, 0]),
        ({"exponential_decay_length_penalty": [5, 1.5]}, [6, 5, 4, 3, 2, 1, 0, 0]),
        ({"min_new_tokens": 2, "forced_eos_token_id": 3}, [0, 0, 5, 4, 3, 2, 1, 0]),
    ],
    ids=str,
)
def test_rules_of_a_place_are_idle_at_the_others(settings, idle):
    rules = LogitsProcessors(GenerationDefaults.of_config({"eos_token_id": ENDS, **settings}, VOCAB_SIZE), VOCAB_SIZE)
    steps = [Step(np.array(SEEN[: 3 + new]), 3, NEW_TOKENS) for new in range(NEW_TOKENS)]
    assert [min(rules.idle(step), NEW_TOKENS - step.new_tokens) for step in steps] == idle


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_left_as_they_are(name):
    # The engine hands out a view of the buffer that the next step writes to.
    for settings in CASES[name]:
        own = logits(0)
        own.flags.writeable = False
        defaults = GenerationDefaults.of_config({"eos_token_id": ENDS, **settings}, VOCAB_SIZE)
        LogitsProcessors(defaults, VOCAB_SIZE)(own, Step(np.array(SEEN[:1]), 1, NEW_TOKENS))
        np.testing.assert_array_equal(own, logits(0))


def test_what_is_no_number_becomes_one(model):
    scores = logits(0)
    scores[[1, 2, 3]] = [np.nan, np.inf, -np.inf]
    expected, found = pair(model, {"remove_invalid_values": True}, SEEN, 3, scores)
    np.testing.assert_array_equal(found, expected)
    assert list(found[[1, 2, 3]]) == [0, np.finfo(np.float32).max, np.finfo(np.float32).min]


def test_an_end_token_that_grows_beyond_float32_stays_a_number():
    defaults = GenerationDefaults.of_config(
        {"eos_token_id": 5, "exponential_decay_length_penalty": [0, 1e30]}, VOCAB_SIZE
    )
    found = LogitsProcessors(defaults, VOCAB_SIZE)(logits(0), Step(np.array(SEEN), 1, 100))
    assert found[5] == np.finfo(np.float32).max
