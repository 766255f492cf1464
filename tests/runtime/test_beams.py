"""Beam search, scores and log-probabilities against transformers' `generate`, with PEFT's prefixes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import prefix_runtime
from prefix_runtime import BusyError, RequestError, Sampling
from prefix_runtime.backends.onnxruntime.shared_cache import SharedCache
from prefix_runtime.backends.registry import BackendLimits
from prefix_runtime.engine import Engine

LENGTHS = (3, 20)
TASKS = {None: 0, "p3": 3, "p20": 20}
PROMPTS = {None: [7], "p3": [5, 6, 7, 8, 9], "p20": [17, 3, 250, 9, 11, 4, 99, 300, 12, 31, 8]}
KINDS = {"fast": {}, "portable": {"target": "portable"}, "baked": {"mode": "bake"}}
TOLERANCE = 1e-5
"""Of a score; of one beyond 1, a part of it: both sides add in float32."""
ABSENT = -1e8
"""transformers fills up texts that there are not with scores of -1e9."""


@pytest.fixture(scope="module")
def models(workshop):
    """By task: PEFT's model, or transformers' alone."""
    path = workshop.model("llama", tokenizer=True)

    def load(length):
        base = AutoModelForCausalLM.from_pretrained(path)
        return (PeftModel.from_pretrained(base, workshop.adapter(path, length)) if length else base).eval()

    return {task: load(length) for task, length in TASKS.items()}


@pytest.fixture(scope="module")
def engines(workshop):
    """Engines on the same model, one for each kind of graph."""
    loaded = {}

    def engine(kind="fast"):
        if kind not in loaded:
            loaded[kind] = prefix_runtime.load(workshop.bundle("llama", LENGTHS, **KINDS[kind]), threads=1)
        return loaded[kind]

    return engine


@pytest.fixture(scope="module")
def engine(engines):
    return engines()


@pytest.fixture(scope="module")
def expected(models):
    """The texts and scores of transformers; texts are padded at the end."""

    def search(prompt, task, tokenizer=None, **settings):
        model = models[task]
        settings = {"pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True, **settings}
        model.generation_config = GenerationConfig(**settings)
        if task:
            model.base_model.generation_config = model.generation_config
        ids = torch.tensor([prompt])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer)
        texts = output.sequences[:, len(prompt) :].tolist()
        return [each for each in zip(texts, output.sequences_scores.tolist(), strict=True) if each[1] > ABSENT]

    return search


def assert_same(result, wanted):
    assert result.token_ids == result.sequences[0].token_ids
    assert result.score == result.sequences[0].score
    assert len(result.sequences) == len(wanted)
    for sequence, (text, score) in zip(result.sequences, wanted, strict=True):
        size = len(sequence.token_ids)
        assert list(sequence.token_ids) == text[:size]
        assert len(set(text[size:])) <= 1, "more than padding"
        assert sequence.score == pytest.approx(score, rel=TOLERANCE, abs=TOLERANCE)


OPTIONS = ("num_beams", "num_return_sequences", "length_penalty", "early_stopping", "max_new_tokens")


def assert_equal_to_transformers(engine, expected, task, prompt=None, **settings):
    prompt = prompt or PROMPTS[task]
    options = {name: settings[name] for name in OPTIONS if name in settings}
    config = {name: value for name, value in settings.items() if name not in options}
    result = engine.generate(token_ids=prompt, task=task, generation_config={"eos_token_id": None, **config}, **options)
    assert_same(result, expected(prompt, task, **settings))
    return result


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.5, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("task", TASKS)
def test_texts_and_scores_are_those_of_generate(engine, expected, task, length_penalty, early_stopping):
    found = assert_equal_to_transformers(
        engine, expected, task, num_beams=4, num_return_sequences=4, max_new_tokens=16, eos_token_id=list(range(40)),
        length_penalty=length_penalty, early_stopping=early_stopping,
    )  # fmt: skip
    assert {sequence.finish_reason for sequence in found.sequences} <= {"end_token", "length"}


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("task", TASKS)
def test_they_are_for_any_number_of_beams_and_texts(engine, expected, task, num_beams):
    for returned in range(1, num_beams + 1):
        for new_tokens in (1, 2, 24):
            assert_equal_to_transformers(
                engine, expected, task, num_beams=num_beams, num_return_sequences=returned, max_new_tokens=new_tokens
            )


RULES = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[5], 9.0], [[7], 9.0]]},
    "min_length": {"min_length": 12, "eos_token_id": list(range(100))},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(100))},
    "forced tokens": {"forced_bos_token_id": 9, "forced_eos_token_id": 3, "eos_token_id": 3},
    "bad words": {"bad_words_ids": [[token_id] for token_id in range(0, 384, 2)] + [[3, 5], [7, 9]]},
    "sequence_bias": {"sequence_bias": [[[5], 3.0], [[5, 7], -9.0], [[7, 5], 4.0]]},
    "exponential decay": {"exponential_decay_length_penalty": [3, 1.3], "eos_token_id": [9, 300]},
    "suppressed": {"suppress_tokens": [each for each in range(384) if each % 12], "begin_suppress_tokens": [0, 12]},
    "three tokens": {"suppress_tokens": [each for each in range(384) if each not in (5, 6, 7)]},
    "renormalized": {"renormalize_logits": True, "repetition_penalty": 1.4, "suppress_tokens": list(range(200))},
    "several": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.6, "eos_token_id": [3, 5, 7], "min_new_tokens": 2},
}


@pytest.mark.parametrize("name", RULES)
def test_rules_act_on_each_beam(engine, expected, name):
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12}
    changed = []
    for task in TASKS:
        found = assert_equal_to_transformers(engine, expected, task, **settings, **RULES[name])
        free = assert_equal_to_transformers(engine, expected, task, **settings)
        changed.append(found.sequences != free.sequences)
    assert any(changed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["p3", "p20"])
def test_every_kind_of_graph_searches_alike(engines, expected, kind, task):
    assert_equal_to_transformers(
        engines(kind), expected, task, num_beams=4, num_return_sequences=4, max_new_tokens=24, eos_token_id=[3, 9, 200]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_prompt_of_a_list_is_searched_as_if_alone(engines, expected, kind):
    tasks = ["p20", "p3", "p3", "p20", "p3"] if kind == "baked" else ["p20", None, "p3", None, "p3"]
    prompts = [[9, 8, 7], [17], [5, 6, 7, 8, 9, 10, 11], [3] * 20, [40, 41]]
    new_tokens = [3, 20, 1, 12, 7]
    config = {"eos_token_id": list(range(60))}
    options = {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True}
    results = engines(kind).generate(
        token_ids=prompts, task=tasks, max_new_tokens=new_tokens, generation_config=config, **options
    )
    for result, prompt, task, count in zip(results, prompts, tasks, new_tokens, strict=True):
        assert_same(result, expected(prompt, task, max_new_tokens=count, **config, **options))
        assert result.task == task


def test_rows_of_a_list_may_have_beams_or_none(engine):
    configs = [{"num_beams": 2}, None, {"num_beams": 9, "num_return_sequences": 4}, {"num_beams": 1}]
    results = engine.generate(token_ids=[[5, 6]] * 4, task="p3", generation_config=configs, max_new_tokens=6)
    assert [len(result.sequences) for result in results] == [1, 0, 4, 0]
    for result, config in zip(results, configs, strict=True):
        alone = engine.generate(token_ids=[5, 6], task="p3", generation_config=config, max_new_tokens=6)
        assert (result.token_ids, result.score) == (alone.token_ids, alone.score)
    assert (results[1].score, results[1].sequences) == (None, ())


@pytest.mark.parametrize("stop", [["e"], [" the", "q"], ["fox jumps"]])
def test_stop_strings_end_beams(engine, expected, workshop, stop):
    tokenizer = AutoTokenizer.from_pretrained(workshop.model("llama", tokenizer=True))
    bias = [[tokenizer.encode(" the", add_special_tokens=False), 9.0], [tokenizer.encode("e"), 9.0]]
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20, "sequence_bias": bias}
    ended = 0
    for task, prompt in PROMPTS.items():
        wanted = expected(prompt, task, tokenizer, stop_strings=stop, **settings)
        found = engine.generate(
            token_ids=prompt, task=task, stop=stop, num_beams=3, num_return_sequences=3, max_new_tokens=20,
            generation_config={"eos_token_id": None, "sequence_bias": bias},
        )  # fmt: skip
        assert_same(found, wanted)
        for sequence in found.sequences:
            whole = tokenizer.decode(sequence.token_ids, skip_special_tokens=True)
            assert whole.startswith(sequence.text)
            if sequence.finish_reason == "stop":
                ended += 1
                assert any(whole[len(sequence.text) :].startswith(string) for string in stop)
    assert ended or stop == ["fox jumps"]


def test_a_stop_string_of_bytes_that_are_no_character_is_found_in_the_text(engine):
    # Two letters, and bytes that no character begins with, which are one token each.
    letters, invalid = [engine.token_id(each) for each in "ab"], [engine.token_id(each) for each in "\u0143\u0142"]
    others = [each for each in range(384) if each not in letters + invalid]
    cycle = [letters, [letters[1], invalid[0]], [letters[1], invalid[1]], [invalid[0], letters[0]]]
    bias = [[pair, 30.0] for pair in cycle]
    found = engine.generate(
        token_ids=[letters[0]], stop="b\ufffd", num_beams=3, num_return_sequences=2, max_new_tokens=9,
        generation_config={"eos_token_id": None, "suppress_tokens": others, "sequence_bias": bias},
    )  # fmt: skip
    assert {sequence.finish_reason for sequence in found.sequences} == {"stop"}
    for sequence in found.sequences:
        text = engine._codec.decode(sequence.token_ids)
        assert sequence.text == text[: text.index("b\ufffd")]


def test_texts_that_there_are_not_are_left_out(engine):
    only = {"eos_token_id": None, "suppress_tokens": [each for each in range(384) if each != 5]}
    found = engine.generate(
        token_ids=[1, 2], num_beams=4, num_return_sequences=4, max_new_tokens=3, generation_config=only
    )
    assert [sequence.token_ids for sequence in found.sequences] == [(5, 5, 5)]


def test_where_rules_forbid_every_token_the_request_is_refused(engine):
    forbidden = {"eos_token_id": None, "bad_words_ids": [[token_id] for token_id in range(384)]}
    with pytest.raises(RequestError, match=r"^expected a token to choose"):
        engine.generate(token_ids=[1, 2], num_beams=2, generation_config=forbidden)


class TestDefaults:
    @pytest.fixture
    def engine_with(self, workshop, tmp_path, rewrite):
        folder = shutil.copytree(workshop.bundle("llama", LENGTHS), tmp_path / "bundle")

        def load(**defaults):
            rewrite(folder, "generation_config.json", json.dumps(defaults).encode())
            return prefix_runtime.load(folder, threads=1)

        return load

    def test_the_models_own_apply(self, engine_with, expected):
        defaults = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True}
        result = engine_with(**defaults).generate(token_ids=PROMPTS["p3"], task="p3", max_new_tokens=9)
        assert_same(result, expected(PROMPTS["p3"], "p3", max_new_tokens=9, **defaults))

    def test_a_request_goes_before_them(self, engine_with, expected):
        engine = engine_with(num_beams=3, num_return_sequences=3, length_penalty=2.0)
        options = {"token_ids": PROMPTS["p3"], "task": "p3", "max_new_tokens": 9}
        assert engine.generate(**options, num_beams=1).sequences == ()
        found = engine.generate(**options, num_beams=2)
        assert_same(
            found,
            expected(PROMPTS["p3"], "p3", max_new_tokens=9, num_beams=2, num_return_sequences=2, length_penalty=2.0),
        )
        assert engine.generate(**options, sampling=Sampling(temperature=1.0)).sequences == ()

    def test_a_model_that_samples_has_none(self, engine_with):
        engine = engine_with(do_sample=True, num_beams=3, num_return_sequences=3)
        assert engine.generate(token_ids=[5, 6], max_new_tokens=3).sequences == ()
        assert len(engine.generate(token_ids=[5, 6], max_new_tokens=3, sampling=Sampling()).sequences) == 3

    def test_a_stream_of_a_model_with_beams_is_refused(self, engine_with):
        engine = engine_with(num_beams=3)
        with pytest.raises(RequestError, match=r"^stream: expected num_beams 1, found 3; pass num_beams=1, or use gen"):
            engine.stream(token_ids=[5, 6])
        assert len(list(engine.stream(token_ids=[5, 6], num_beams=1, max_new_tokens=4))) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected a whole number, 1 to 1024, found 0"),
        ({"num_beams": 2.0}, "num_beams: expected a whole number, 1 to 1024, found 2.0"),
        ({"num_beams": 1025}, "num_beams: expected a whole number, 1 to 1024, found 1025"),
        ({"num_return_sequences": 2}, "num_return_sequences: expected at most num_beams, 1, found 2"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences: expected at most num_beams, 2, found 3"),
        ({"num_beams": 2, "num_return_sequences": 0}, "num_return_sequences: expected a whole number, 1 or more, foun"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty: expected a number, -50 to 50, found nan"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping: expected true, false or \"never\", found 'soon'"),
        ({"num_beams": 2, "sampling": Sampling(temperature=1.0)}, "num_beams: expected 1 with sampling, found 2; for"),
        ({"generation_config": {"num_beams": 2, "do_sample": True}}, "num_beams: expected 1 with sampling, found 2;"),
        ({"token_logprobs": 1}, "token_logprobs: expected True or False, found 1"),
    ],
    ids=str,
)
def test_a_request_that_makes_no_sense_is_refused(engine, options, message):
    with pytest.raises(RequestError) as caught:
        engine.generate(token_ids=[5, 6], max_new_tokens=3, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_beams_beyond_the_memory_are_refused(engine, workshop):
    size = engine._pool._position_bytes * 64
    own = prefix_runtime.load(workshop.bundle("llama", LENGTHS), threads=1, max_cache_bytes=3 * size)
    assert len(own.generate(token_ids=[5, 6], max_new_tokens=4, num_beams=3).token_ids) == 4
    with pytest.raises(
        RequestError, match=f"^expected a request .* {3 * size} bytes .* one of {4 * size}; lower num_b"
    ) as caught:
        own.generate(token_ids=[5, 6], max_new_tokens=4, num_beams=4)
    assert not isinstance(caught.value, BusyError)


def test_more_beams_than_the_provider_has_rows_are_refused(engine, monkeypatch):
    monkeypatch.setattr(type(engine._backend), "limits", BackendLimits(rows=2))
    own = Engine(engine.bundle, engine._backend, 320)
    with pytest.raises(RequestError, match=r"^num_beams: expected at most 2, the rows that the provider runs toge"):
        own.generate(token_ids=[5, 6], num_beams=3)
    assert own.generate(token_ids=[5, 6], num_beams=2, max_new_tokens=3).sequences


def test_a_prompt_is_run_once_and_only_what_differs_is_copied(engine, monkeypatch):
    asked = []
    for name in ("prefill", "fork"):
        method = getattr(SharedCache, name)

        def note(self, *arguments, name=name, method=method, **options):
            asked.append((name, *arguments))
            return method(self, *arguments, **options)

        monkeypatch.setattr(SharedCache, name, note)
    prompt, prefix = PROMPTS["p20"], 20
    engine.generate(token_ids=prompt, task="p20", num_beams=4, max_new_tokens=12)
    assert [each[0] for each in asked[:5]] == ["prefill", "fork", "fork", "fork", "fork"]
    assert [each[0] for each in asked].count("prefill") == 1
    assert {start for _, _, _, start in asked[1:4]} == {prefix}
    assert all(start >= prefix + len(prompt) for _, _, _, start in asked[4:])


def test_metrics_count_the_steps(engine):
    found = engine.generate(token_ids=[5, 6, 7], task="p3", num_beams=3, max_new_tokens=6).metrics
    assert (found.prompt_length, found.prefix_length, found.new_tokens) == (3, 3, 6)
    assert len(found.inter_token_latencies) == 5


class TestLogprobs:
    def logprobs(self, models, task, prompt, target):
        """By transformers, of each token of a target behind a prompt."""
        ids = torch.tensor([[*prompt, *target]])
        with torch.no_grad():
            logits = models[task](input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        rows = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        return rows[torch.arange(len(target)), torch.tensor(target)].numpy()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("target", [[9], [9, 300, 4, 4, 77, 2]], ids=len)
    @pytest.mark.parametrize("task", ["p3", "p20"])
    def test_a_target_scores_as_with_transformers(self, engines, models, kind, task, target):
        found = engines(kind).score(PROMPTS[task], target, task)
        wanted = self.logprobs(models, task, PROMPTS[task], target)
        np.testing.assert_allclose(found.token_logprobs, wanted, rtol=0, atol=TOLERANCE)
        assert found.logprob == pytest.approx(wanted.sum(), abs=len(target) * TOLERANCE)
        assert found.token_ids == tuple(target)

    def test_texts_score_as_their_tokens(self, engine):
        tokens = [engine._codec.encode(text) for text in ("the quick", " brown fox")]
        assert engine.score("the quick", " brown fox", task="p3") == engine.score(*tokens, task="p3")

    def test_a_special_token_is_added_to_the_prompt_alone(self, starting_bundle):
        engine = prefix_runtime.load(starting_bundle, threads=1)
        own = [engine._codec.encode(text, with_special_tokens=False) for text in ("fox", " the")]
        assert engine.score("fox", " the") == engine.score([0, *own[0]], own[1])

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 3}, {"sampling": Sampling(1.0)}])
    def test_generated_tokens_have_the_models_own(self, engine, models, options):
        rules = {"eos_token_id": None, "repetition_penalty": 1.5, "suppress_tokens": list(range(90))}
        found = engine.generate(
            token_ids=PROMPTS["p3"],
            task="p3",
            max_new_tokens=9,
            token_logprobs=True,
            generation_config=rules,
            **options,
        )
        for each in found.sequences or (found,):
            wanted = self.logprobs(models, "p3", PROMPTS["p3"], list(each.token_ids))
            np.testing.assert_allclose(each.token_logprobs, wanted, rtol=0, atol=TOLERANCE)
        assert found.token_logprobs == (found.sequences or (found,))[0].token_logprobs

    def test_a_score_without_rules_is_the_sum(self, engine):
        found = engine.generate(
            token_ids=[5, 6], num_beams=3, length_penalty=0.0, max_new_tokens=7, token_logprobs=True
        )
        assert sum(found.token_logprobs) == pytest.approx(found.score, abs=TOLERANCE)
        assert engine.score([5, 6], found.token_ids).logprob == pytest.approx(found.score, abs=10 * TOLERANCE)

    def test_without_the_option_there_are_none(self, engine):
        assert engine.generate(token_ids=[5, 6], max_new_tokens=2).token_logprobs is None
        assert engine.generate(token_ids=[5, 6], max_new_tokens=2, num_beams=2).sequences[0].token_logprobs is None

    @pytest.mark.parametrize(
        ("prompt", "target", "message"),
        [
            ([5], [], "target: expected at least one token"),
            ([], [5], "prompt: expected at least one token"),
            ([5], [384], r"token_ids\[0\]: expected 0 to 383, found 384"),
            ([5], 5, "token_ids: expected a list of whole numbers, found 5"),
            (None, [5], "token_ids: expected a list of whole numbers, found None"),
        ],
    )
    def test_what_cannot_be_scored_is_refused(self, engine, prompt, target, message):
        with pytest.raises(RequestError, match=f"^{message}"):
            engine.score(prompt, target)
