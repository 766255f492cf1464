"""A model's own generation defaults, followed as PEFT's and transformers' `generate` follow them."""

from __future__ import annotations

import json
import shutil
import types
from dataclasses import replace

import numpy as np
import pytest

import prefix_runtime
from prefix_runtime import RequestError, Sampling
from prefix_runtime.backends.onnxruntime.shared_cache import SharedCache
from prefix_runtime.generation.answer import GrowingAnswer
from prefix_runtime.generation.generation_config import PLAIN
from prefix_runtime.generation.sampling import distribution

torch = pytest.importorskip("torch", reason="what is expected comes from torch")
transformers = pytest.importorskip("transformers", reason="what is expected comes from transformers")
PeftModel = pytest.importorskip("peft").PeftModel
AutoModelForCausalLM, GenerationConfig = transformers.AutoModelForCausalLM, transformers.GenerationConfig

TASK, LENGTH = "p10", 10
LENGTHS = (1, 10, 50, 200)  # of the bundle that the comparison with PEFT builds too
PROMPT = [5, 6, 7, 260, 12]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(workshop, tmp_path_factory):
    """A copy of a Llama's bundle, whose generation defaults are rewritten."""
    source = workshop.bundle("llama", LENGTHS, tokenizer=False)
    return shutil.copytree(source, tmp_path_factory.mktemp("defaults") / "bundle")


@pytest.fixture(scope="module")
def engine_with(folder, rewrite):
    """An engine on the bundle with these generation defaults."""

    def load(**defaults):
        rewrite(folder, "generation_config.json", json.dumps(defaults).encode())
        return prefix_runtime.load(folder, threads=1)

    return load


@pytest.fixture(scope="module")
def generate(workshop):
    """The new tokens of PEFT under the prefix, or of transformers without it, with these defaults of the model."""
    path = workshop.model("llama")
    bare = AutoModelForCausalLM.from_pretrained(path).eval()
    adapter = workshop.adapter(path, LENGTH)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), adapter).eval()

    def new_tokens(prompt, task, defaults, options=types.MappingProxyType({"max_new_tokens": NEW_TOKENS})):
        model = wrapped if task else bare
        model.generation_config = GenerationConfig(**{"pad_token_id": 0, **defaults})
        if task:
            wrapped.base_model.generation_config = model.generation_config
        ids = torch.tensor([prompt])
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return found[0, len(prompt) :].tolist()

    return new_tokens


@pytest.fixture(scope="module")
def free(generate):
    """The tokens that each condition answers with no defaults at all."""
    return {task: generate(PROMPT, task, {}) for task in (None, TASK)}


# Each of the tokens that come without it, so that it changes them.
DEFAULTS = {
    "suppress_tokens": lambda free: {"suppress_tokens": free[:2]},
    "begin_suppress_tokens": lambda free: {"begin_suppress_tokens": free[:1]},
    "repetition_penalty": lambda free: {"repetition_penalty": 0.3},
    "encoder_repetition_penalty": lambda free: {"encoder_repetition_penalty": 30.0},
    "bad_words_ids": lambda free: {"bad_words_ids": [free[:2], [PROMPT[-1], free[0]], free[2:3]]},
    "sequence_bias": lambda free: {"sequence_bias": [[free[1:2], -50.0], [[free[0], free[2]], 9.0]]},
    "min_length": lambda free: {"eos_token_id": free[1], "min_length": len(PROMPT) + 4},
    "min_length that the prompt has": lambda free: {"eos_token_id": free[1], "min_length": len(PROMPT)},
    "min_new_tokens": lambda free: {"eos_token_id": free[:2], "min_new_tokens": 6},
    "min_new_tokens before min_length": lambda free: {"eos_token_id": free[3], "min_new_tokens": 1, "min_length": 100},
    "forced_eos_token_id": lambda free: {"forced_eos_token_id": 9},
    "exponential_decay": lambda free: {"eos_token_id": 9, "exponential_decay_length_penalty": [2, 1.6]},
    "remove_invalid_values": lambda free: {"remove_invalid_values": True, "suppress_tokens": free[:1]},
    "renormalize_logits": lambda free: {"renormalize_logits": True, "repetition_penalty": 0.3},
    "eos_token_id": lambda free: {"eos_token_id": free[2]},
    "several end tokens": lambda free: {"eos_token_id": [free[3], free[2]]},
    "several": lambda free: {
        "eos_token_id": free[1],
        "min_new_tokens": 4,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": free[:1],
        "forced_eos_token_id": [8, 9],
    },
}
IDLE = {
    "nothing": lambda free: {},
    "an end token beyond the vocabulary": lambda free: {"eos_token_id": 5000, "min_new_tokens": 3},
    "suppressed tokens beyond the vocabulary": lambda free: {"suppress_tokens": [384, 5000]},
    "sampling settings without do_sample": lambda free: {"temperature": 0.0, "top_p": 0.6, "top_k": 3},
    "a prompt of several tokens": lambda free: {"forced_bos_token_id": 9},
}


@pytest.mark.parametrize("task", [None, TASK])
@pytest.mark.parametrize("name", DEFAULTS | IDLE)
def test_greedy_tokens_are_those_of_generate(engine_with, generate, free, name, task):
    defaults = (DEFAULTS | IDLE)[name](free[task])
    expected = generate(PROMPT, task, defaults)
    assert (expected != free[task]) == (name in DEFAULTS)
    engine = engine_with(**defaults)
    assert list(engine.generate(token_ids=PROMPT, task=task, max_new_tokens=NEW_TOKENS).token_ids) == expected
    streamed = engine.stream(token_ids=PROMPT, task=task, max_new_tokens=NEW_TOKENS)
    assert [chunk.token_id for chunk in streamed] == expected


@pytest.mark.parametrize("name", DEFAULTS | IDLE)
def test_a_request_asks_for_what_the_model_may(engine_with, generate, free, name):
    defaults = (DEFAULTS | IDLE)[name](free[TASK])
    expected = generate(PROMPT, TASK, defaults)
    asked, other = engine_with().generate(
        token_ids=[PROMPT, PROMPT], task=TASK, max_new_tokens=NEW_TOKENS, generation_config=[defaults, None]
    )
    assert (list(asked.token_ids), list(other.token_ids)) == (expected, free[TASK])


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_request_turns_the_models_defaults_off(engine_with, free, name):
    engine = engine_with(**DEFAULTS[name](free[TASK]))
    off = {**PLAIN, "eos_token_id": None}
    found = engine.generate(token_ids=PROMPT, task=TASK, max_new_tokens=NEW_TOKENS, generation_config=off)
    assert list(found.token_ids) == free[TASK]


@pytest.mark.parametrize("task", [None, TASK])
@pytest.mark.parametrize(
    "defaults",
    [
        {"forced_bos_token_id": 9},
        {"forced_bos_token_id": 9, "begin_suppress_tokens": [9]},
        {"begin_suppress_tokens": list(range(1, 384, 2))},
        {"min_length": 3, "eos_token_id": list(range(200))},
        {"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_behind_one_token_too_they_are_those_of_generate(engine_with, generate, defaults, task):
    found = engine_with(**defaults).generate(token_ids=[5], task=task, max_new_tokens=NEW_TOKENS)
    assert list(found.token_ids) == generate([5], task, defaults)


@pytest.mark.parametrize(
    "defaults",
    [{"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}, {"encoder_no_repeat_ngram_size": 1}],
    ids=str,
)
def test_a_run_of_the_prompt_does_not_come_again(engine_with, generate, defaults):
    few = {"suppress_tokens": [token for token in range(384) if token % 12]}  # so that text repeats itself
    prompt = [*PROMPT, *generate(PROMPT, TASK, few)]
    expected = generate(prompt, TASK, few | defaults)
    assert expected != generate(prompt, TASK, few)
    found = engine_with(**few, **defaults).generate(token_ids=prompt, task=TASK, max_new_tokens=NEW_TOKENS)
    assert list(found.token_ids) == expected


class TestLengths:
    @pytest.mark.parametrize(
        "defaults", [{"max_new_tokens": 7}, {"max_length": 9}, {"max_length": 9, "max_new_tokens": 7}]
    )
    def test_the_models_own_length_is_the_default(self, engine_with, generate, defaults):
        found = engine_with(**defaults).generate(token_ids=PROMPT, task=TASK)
        assert list(found.token_ids) == generate(PROMPT, TASK, defaults, {})

    def test_a_request_goes_before_it(self, engine_with):
        engine = engine_with(max_new_tokens=7, min_new_tokens=6)
        assert len(engine.generate(token_ids=PROMPT, max_new_tokens=9).token_ids) == 9
        assert len(engine.generate(token_ids=PROMPT, generation_config={"max_new_tokens": 8}).token_ids) == 8
        assert len(engine.generate(token_ids=PROMPT, max_new_tokens=2).token_ids) == 2

    def test_a_length_beyond_the_context_is_cut(self, engine_with):
        assert len(engine_with(max_new_tokens=5000).generate(token_ids=[5] * 315).token_ids) == 5

    def test_a_prompt_as_long_as_the_models_max_length_is_refused(self, engine_with):
        engine = engine_with(max_length=5)
        with pytest.raises(
            RequestError, match=r"^prompt: expected fewer tokens than the model's max_length, 5, found 5;"
        ):
            engine.generate(token_ids=PROMPT)
        assert len(engine.generate(token_ids=PROMPT, max_new_tokens=3).token_ids) == 3


SAMPLED = {"do_sample": True, "temperature": 1.7, "top_p": 0.9, "repetition_penalty": 1.3}


class TestSampling:
    def test_a_model_that_samples_does_so_as_transformers_would(self, engine_with):
        # transformers keeps 50 tokens unless something else is said.
        sampling = engine_with(**SAMPLED).generation_defaults().sampling
        assert sampling == Sampling(temperature=1.7, top_k=50, top_p=0.9)

    def test_tokens_come_as_often_as_transformers_draws_them(self, engine_with, generate):
        defaults = {"do_sample": True, "top_k": 4, "temperature": 2.0, "suppress_tokens": list(range(100))}
        engine, draws = engine_with(**defaults), 400
        results = engine.generate(token_ids=[PROMPT] * draws, task=TASK, max_new_tokens=1)
        found = np.bincount([result.token_ids[0] for result in results], minlength=384)
        logits = engine.logits(PROMPT, TASK)[-1]
        logits[:100] = -np.inf
        ids, probabilities = distribution(logits, Sampling(temperature=2.0, top_k=4))
        expected = np.zeros(384)
        expected[ids] = probabilities
        assert found.sum() == found[expected > 0].sum() == draws
        # Five standard deviations of a binomial distribution.
        np.testing.assert_array_less(abs(found - draws * expected), 5 * np.sqrt(draws * expected * (1 - expected)) + 1)
        theirs = {generate(PROMPT, TASK, defaults, {"max_new_tokens": 1})[0] for _ in range(20)}
        assert theirs <= set(ids.tolist())

    def test_an_explicit_sampling_is_greedy_and_keeps_the_other_defaults(self, engine_with, generate):
        expected = generate(PROMPT, TASK, SAMPLED | {"do_sample": False})
        options = {"token_ids": PROMPT, "task": TASK, "max_new_tokens": NEW_TOKENS}
        engine = engine_with(**SAMPLED)
        assert list(engine.generate(**options, sampling=Sampling()).token_ids) == expected
        assert list(engine.generate(**options, generation_config={"do_sample": False}).token_ids) == expected

    def test_a_seed_makes_the_models_own_sampling_repeatable(self, engine_with):
        engine = engine_with(**SAMPLED)
        seeded = replace(engine.generation_defaults().sampling, seed=3)
        texts = {engine.generate(token_ids=PROMPT, max_new_tokens=9, sampling=seeded).token_ids for _ in range(3)}
        assert len(texts) == 1
        assert len({engine.generate(token_ids=PROMPT, max_new_tokens=9).token_ids for _ in range(4)}) == 4

    @pytest.mark.parametrize("penalty", [None, 1.0, 2.5])
    def test_a_penalty_of_the_request_goes_before_the_models(self, engine_with, generate, penalty):
        defaults = {"repetition_penalty": 1.4}
        expected = generate(PROMPT, TASK, {"repetition_penalty": penalty or 1.4})
        found = engine_with(**defaults).generate(
            token_ids=PROMPT, task=TASK, max_new_tokens=NEW_TOKENS, sampling=Sampling(repetition_penalty=penalty)
        )
        assert list(found.token_ids) == expected


class TestEndTokens:
    @pytest.mark.parametrize("named", [None, 0, [0, 383]])
    @pytest.mark.parametrize("as_type", [int, list, tuple, np.array, np.int64])
    def test_a_request_names_its_own(self, engine_with, generate, free, named, as_type):
        end = free[TASK][4]
        given = as_type(end) if as_type in (int, np.int64) else as_type([383, end])
        expected = generate(PROMPT, TASK, {"eos_token_id": end})
        engine = engine_with(eos_token_id=named)
        found = engine.generate(token_ids=PROMPT, task=TASK, max_new_tokens=NEW_TOKENS, end_tokens=given)
        assert (list(found.token_ids), found.finish_reason) == (expected, "end_token")

    @pytest.mark.parametrize(
        "options", [{"end_tokens": []}, {"ignore_end": True}, {"generation_config": {"eos_token_id": None}}]
    )
    def test_a_request_goes_on_behind_the_models(self, engine_with, free, options):
        engine = engine_with(eos_token_id=free[TASK][2])
        found = engine.generate(token_ids=PROMPT, task=TASK, max_new_tokens=NEW_TOKENS, **options)
        assert (list(found.token_ids), found.finish_reason) == (free[TASK], "length")

    def test_least_lengths_hold_back_the_end_tokens_of_the_request(self, engine_with, generate, free):
        end = free[TASK][2]
        expected = generate(PROMPT, TASK, {"min_new_tokens": 6, "eos_token_id": end})
        found = engine_with(min_new_tokens=6).generate(
            token_ids=PROMPT, task=TASK, max_new_tokens=NEW_TOKENS, end_tokens=end
        )
        assert list(found.token_ids) == expected

    @pytest.mark.parametrize("ends", ["0", -1, 384, [0, 384], [True], 1.5, {"a": 1}, [[0]], b"a"])
    def test_what_is_no_token_is_refused(self, engine_with, ends):
        with pytest.raises(RequestError, match=r"^end_tokens: expected token ids of 0 to 383, found"):
            engine_with().generate(token_ids=PROMPT, end_tokens=ends)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_time": 4}, r"generation_config: expected some of max_length, .*, found \['max_time'\]"),
        ([1], "generation_config: expected a mapping, found"),
        ("do_sample", "generation_config: expected a mapping, found"),
        ({"min_new_tokens": -1}, "min_new_tokens: expected a whole number, 0 or more, found -1"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens: expected at most max_new_tokens, 3, found 9"),
        ({"exponential_decay_length_penalty": [3, 1.5]}, "exponential_decay_length_penalty: expected an end token"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(engine_with, given, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        engine_with().generate(token_ids=PROMPT, generation_config=given)


def test_where_rules_forbid_every_token_the_request_is_refused(engine_with):
    with pytest.raises(RequestError, match="expected a token to choose"):
        engine_with().generate(
            token_ids=PROMPT, generation_config={"bad_words_ids": [[token_id] for token_id in range(384)]}
        )


def test_without_rules_tokens_are_chosen_where_the_logits_are(engine_with, monkeypatch):
    steps = []
    monkeypatch.setattr(SharedCache, "choose", recording(steps, "choose", SharedCache.choose))
    monkeypatch.setattr(GrowingAnswer, "take", recording(steps, "take", GrowingAnswer.take))
    for defaults, expected in (
        ({}, ["take"] + ["choose"] * 4),
        ({"repetition_penalty": 1.5}, ["take"] * 5),
        ({"begin_suppress_tokens": [3]}, ["take"] + ["choose"] * 4),
        ({"min_new_tokens": 3, "eos_token_id": 3}, ["take"] * 3 + ["choose"] * 2),
        ({"forced_eos_token_id": 3}, ["take"] + ["choose"] * 3 + ["take"]),
    ):
        steps.clear()
        engine_with(**defaults).generate(token_ids=PROMPT, max_new_tokens=5)
        assert steps == expected


def recording(steps, name, method):
    def record(self, *arguments, **options):
        steps.append(name)
        return method(self, *arguments, **options)

    return record
