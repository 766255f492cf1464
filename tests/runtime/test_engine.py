"""`load` and `generate`: what goes in, what comes out, what is refused, from any number of threads."""

from __future__ import annotations

import json
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import prefix_runtime
from prefix_runtime import (
    Bundle,
    BundleError,
    BundleIntegrityError,
    ContextOverflowError,
    DuplicateTaskError,
    PrefixError,
    PrefixMismatchError,
    ProviderError,
    RequestError,
    Sampling,
    TaskNameError,
    UnknownTaskError,
)

IDS = [5, 6, 7, 260, 12]
TASKS = [None, "p3", "p20"]
CONTEXT = 320
SAMPLING = {"temperature": 1.5, "top_k": 50, "top_p": 0.95}


@pytest.fixture(scope="module")
def bare(workshop):
    """An engine without tokenizer and end token."""
    return prefix_runtime.load(workshop.bundle(tokenizer=False), threads=1)


@pytest.fixture
def own(shared_bundle):
    """An engine of the test's own, to add tasks to."""
    return prefix_runtime.load(shared_bundle, threads=1)


@pytest.fixture
def engine_ending_with(bundle, rewrite):
    """An engine on a bundle whose configuration names these end tokens."""

    def load(value, name="generation_config.json"):
        config = json.loads((bundle / name).read_text()) | {"eos_token_id": value}
        rewrite(bundle, name, json.dumps(config).encode())
        return prefix_runtime.load(bundle, threads=1)

    return load


def tokens(engine, task=None, count=20, **options):
    return engine.generate(token_ids=IDS, task=task, max_new_tokens=count, **options).token_ids


class TestPrompts:
    @pytest.mark.parametrize("task", TASKS)
    def test_text_and_its_token_ids_are_answered_alike(self, engine, tokenizer, task):
        text = "the quick é"
        one = engine.generate(text, task=task, max_new_tokens=9)
        other = engine.generate(token_ids=tokenizer.encode(text).ids, task=task, max_new_tokens=9)
        assert (one.text, one.token_ids, one.task) == (other.text, other.token_ids, task)

    @pytest.mark.parametrize("task", TASKS)
    def test_the_text_is_what_the_tokenizer_decodes(self, engine, tokenizer, task):
        result = engine.generate("the lazy dog", task=task, max_new_tokens=30)
        assert result.text == tokenizer.decode(result.token_ids).rstrip("\ufffd")
        assert result.text

    def test_the_bare_models_tokens_are_those_of_transformers(self, engine, workshop):
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(workshop.model(tokenizer=True)).eval()
        ids = torch.tensor([IDS])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, pad_token_id=0)
        assert tokens(engine, count=40) == tuple(expected[0, len(IDS) :].tolist())

    @pytest.mark.parametrize(
        "ids", [IDS, tuple(IDS), np.array(IDS), np.array(IDS, np.int32), [np.int64(i) for i in IDS], range(5, 10)]
    )
    def test_token_ids_may_be_any_sequence_of_whole_numbers(self, engine, ids):
        expected = engine.generate(token_ids=[int(i) for i in ids], max_new_tokens=3).token_ids
        assert engine.generate(token_ids=ids, max_new_tokens=3).token_ids == expected
        assert all(type(token_id) is int for token_id in expected)

    def test_a_list_of_texts_gives_a_list_of_results(self, engine):
        prompts = ["the quick", "brown", "fox jumps"]
        found = engine.generate(prompts, task="p3", max_new_tokens=5)
        alone = [engine.generate(prompt, task="p3", max_new_tokens=5) for prompt in prompts]
        assert [(r.text, r.token_ids, r.task) for r in found] == [(r.text, r.token_ids, "p3") for r in alone]

    @pytest.mark.parametrize("rows", [[[5, 6], [7]], np.array([[5, 6], [7, 8]]), [(5,)], [np.array([5, 6]), [7]]])
    def test_a_list_of_token_ids_gives_a_list_of_results(self, engine, rows):
        found = engine.generate(token_ids=rows, max_new_tokens=4)
        alone = [engine.generate(token_ids=row, max_new_tokens=4) for row in rows]
        assert [r.token_ids for r in found] == [r.token_ids for r in alone]

    @pytest.mark.parametrize("rows", [[[5, 6], 7], [np.array([5, 6]), 7]])
    def test_rows_beside_what_is_none_are_refused(self, engine, rows):
        expected = r"^token_ids\[1\]: expected a list of whole numbers like the others, found 7$"
        with pytest.raises(RequestError, match=expected):
            engine.generate(token_ids=rows, max_new_tokens=4)

    def test_each_prompt_of_a_list_may_have_a_task_of_its_own(self, engine):
        found = engine.generate(token_ids=[IDS] * 4, task=["p3", None, "p20", "p3"], max_new_tokens=8)
        assert [r.task for r in found] == ["p3", None, "p20", "p3"]
        assert [r.token_ids for r in found] == [tokens(engine, task, 8) for task in ("p3", None, "p20", "p3")]

    def test_an_empty_list_of_prompts_gives_no_results(self, engine):
        assert engine.generate([]) == []

    @pytest.mark.parametrize(("prompt", "ids", "found"), [(None, None, "neither"), ("a", [1], "both")])
    def test_both_or_neither_prompt_are_refused(self, engine, prompt, ids, found):
        with pytest.raises(RequestError, match=f"expected either a prompt or token_ids, found {found}"):
            engine.generate(prompt, token_ids=ids)

    @pytest.mark.parametrize(
        "prompt", [{"prompt": ""}, {"prompt": ["a", ""]}, {"token_ids": []}, {"token_ids": [[1], []]}]
    )
    @pytest.mark.parametrize("task", ["p3", None])
    def test_an_empty_prompt_is_refused(self, engine, prompt, task):
        with pytest.raises(RequestError, match="prompt: expected at least one token, found none"):
            engine.generate(**prompt, task=task)

    @pytest.mark.parametrize("index", [0, 3])
    @pytest.mark.parametrize("token_id", [-1, 384, 2**31, 2**63, 2**70])
    def test_token_ids_out_of_range_are_refused(self, engine, token_id, index):
        ids = [1, 2, 3, 4]
        ids[index] = token_id
        with pytest.raises(RequestError, match=rf"token_ids\[{index}\]: expected 0 to 383, found {token_id}$"):
            engine.generate(token_ids=ids)

    @pytest.mark.parametrize("token_id", [1.0, np.float32(1), True, np.True_, "1", None, [1]])
    @pytest.mark.parametrize("ask", ["generate", "stream", "logits"])
    def test_what_is_no_whole_number_is_refused(self, engine, token_id, ask):
        with pytest.raises(RequestError, match=r"token_ids\[1\]: expected a whole number, found "):
            getattr(engine, ask)(token_ids=[1, token_id])

    @pytest.mark.parametrize("ids", ["12", b"12"])
    def test_text_in_place_of_token_ids_is_refused(self, engine, ids):
        with pytest.raises(
            RequestError, match=f"token_ids: expected whole numbers, found {ids!r}; give text as the prompt"
        ):
            engine.generate(token_ids=ids)

    def test_token_ids_in_place_of_text_are_refused(self, engine):
        with pytest.raises(RequestError, match="prompt: expected text or a list of texts; give token ids as token_ids"):
            engine.generate([1, 2])

    def test_text_that_is_no_unicode_is_refused(self, engine):
        with pytest.raises(RequestError, match="prompt: expected Unicode text"):
            engine.generate("a\udcff")

    @pytest.mark.parametrize(("tasks", "found"), [(["p3"], 1), ([], 0), (["p3"] * 3, 3)])
    def test_a_wrong_number_of_tasks_is_refused(self, engine, tasks, found):
        with pytest.raises(RequestError, match=f"one for each of the 2 prompts, found {found}"):
            engine.generate(token_ids=[IDS, IDS], task=tasks)

    def test_a_list_with_one_wrong_prompt_is_refused_before_the_first_is_run(self, engine, monkeypatch):
        def run(*_):
            pytest.fail("nothing may run")

        monkeypatch.setattr(engine, "_run", run)
        with pytest.raises(RequestError, match=r"token_ids\[0\]: expected 0 to 383, found 999"):
            engine.generate(token_ids=[IDS, [999]])

    def test_an_unknown_option_is_refused(self, engine):
        with pytest.raises(TypeError, match=r"options max_new_tokens, sampling, stop, .*, found .*max_tokens"):
            engine.generate("a", max_tokens=3)


class TestLengths:
    @pytest.mark.parametrize("count", [1, 2, 17])
    def test_as_many_tokens_come_as_were_asked_for(self, bare, count):
        result = bare.generate(token_ids=IDS, max_new_tokens=count)
        assert (len(result.token_ids), result.finish_reason) == (count, "length")

    @pytest.mark.parametrize("count", [0, -1, True, 2.0, "3", math.inf, math.nan])
    def test_a_number_of_new_tokens_that_is_none_is_refused(self, engine, count):
        with pytest.raises(RequestError, match=f"max_new_tokens: expected a whole number, 1 or more, found {count!r}"):
            engine.generate(token_ids=IDS, max_new_tokens=count)

    @pytest.mark.parametrize(("prompt", "expected"), [(10, 256), (64, 256), (65, 255), (100, 220), (319, 1)])
    def test_the_default_is_256_or_what_the_context_has_room_for(self, bare, prompt, expected):
        for options in ({}, {"max_new_tokens": None}):
            assert len(bare.generate(token_ids=[7] * prompt, **options).token_ids) == expected

    def test_the_default_leaves_room_for_the_prefix(self, bare):
        assert len(bare.generate(token_ids=[7] * 100, task="p20").token_ids) == 200

    @pytest.mark.parametrize(("task", "room"), [(None, CONTEXT), ("p3", CONTEXT - 3), ("p20", CONTEXT - 20)])
    @pytest.mark.parametrize("new", [1, 40])
    def test_the_context_may_be_filled_to_its_end_and_no_further(self, bare, task, room, new):
        assert bare.room(task) == room
        assert len(bare.generate(token_ids=[7] * (room - new), task=task, max_new_tokens=new).token_ids) == new
        message = f"at most {room} tokens .*context 320.*prefix {320 - room}.*prompt of {room - new} and {new + 1} new"
        with pytest.raises(ContextOverflowError, match=message):
            bare.generate(token_ids=[7] * (room - new), task=task, max_new_tokens=new + 1)

    @pytest.mark.parametrize("length", [320, 321, 5000])
    def test_a_prompt_that_leaves_no_room_is_refused(self, bare, length):
        with pytest.raises(ContextOverflowError, match=f"at most 320 tokens.*found a prompt of {length} and 1 new"):
            bare.generate(token_ids=[7] * length)

    def test_a_prefix_whose_text_begins_at_0_takes_room_in_the_buffer_alone(self, own, make_prefix):
        own.add_task("zero", make_prefix(30, position_base=0))
        assert own.room("zero") == CONTEXT - 30
        assert len(own.logits([7] * (CONTEXT - 30), "zero")) == CONTEXT - 30

    def test_the_longest_prefix_leaves_room_for_a_token_of_prompt_and_a_new_one(self, own, make_prefix):
        own.add_task("long", make_prefix(CONTEXT - 2))
        assert len(own.generate(token_ids=[7], task="long").token_ids) == 1
        with pytest.raises(ContextOverflowError, match="expected at most 2 tokens"):
            own.generate(token_ids=[7, 8], task="long")

    def test_the_whole_context_may_be_asked_for_logits(self, bare):
        assert bare.logits([7] * CONTEXT).shape == (CONTEXT, 384)
        with pytest.raises(ContextOverflowError, match=r"at most 320 tokens.*found a prompt of 321 and 0 new"):
            bare.logits([7] * (CONTEXT + 1))

    def test_a_lowered_length_holds_and_changes_nothing_else(self, shared_bundle, engine):
        lowered = prefix_runtime.load(shared_bundle, threads=1, max_length=50)
        assert (lowered.room(), lowered.room("p20")) == (50, 30)
        assert tokens(lowered, "p20", 25) == tokens(engine, "p20", 25)
        with pytest.raises(ContextOverflowError, match="max_length 50, prefix 20"):
            tokens(lowered, "p20", 26)

    def test_a_task_longer_than_the_lowered_length_is_refused(self, shared_bundle):
        with pytest.raises(ContextOverflowError, match="max_length 10, prefix 20"):
            prefix_runtime.load(shared_bundle, threads=1, max_length=10).generate("a", task="p20")

    @pytest.mark.parametrize("length", [0, -1, 321, 2.5, "12", True])
    def test_a_length_that_the_bundle_does_not_have_is_refused(self, shared_bundle, length):
        with pytest.raises(RequestError, match=f"max_length: expected 1 to the bundle's 320, found {length!r}"):
            prefix_runtime.load(shared_bundle, max_length=length)


class TestEndings:
    @pytest.mark.parametrize("place", [0, 1, 9])
    @pytest.mark.parametrize("as_list", [False, True])
    def test_an_end_token_ends_the_text_and_is_given(self, engine, engine_ending_with, place, as_list):
        free = tokens(engine, "p3")
        end = free[place]
        ending = engine_ending_with([383, end] if as_list else end)
        result = ending.generate(token_ids=IDS, task="p3", max_new_tokens=20)
        assert result.token_ids == free[: free.index(end) + 1]
        assert result.finish_reason == "end_token"

    def test_the_first_of_several_end_tokens_ends_the_text(self, engine, engine_ending_with):
        free = tokens(engine)
        ends = {free[8], free[4]}
        first = min(free.index(end) for end in ends)
        assert tokens(engine_ending_with(sorted(ends))) == free[: first + 1]

    def test_an_end_token_that_comes_last_is_the_reason(self, engine, engine_ending_with):
        free = tokens(engine)
        first = free.index(free[6])
        result = engine_ending_with(free[6]).generate(token_ids=IDS, max_new_tokens=first + 1)
        assert (len(result.token_ids), result.finish_reason) == (first + 1, "end_token")

    def test_without_a_generation_config_the_models_config_names_the_end_token(
        self, engine, engine_ending_with, bundle
    ):
        free = tokens(engine)
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "generation_config.json"]
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        assert tokens(engine_ending_with(free[2], "config.json")) == free[: free.index(free[2]) + 1]

    def test_a_generation_config_that_names_none_means_that_there_is_none(
        self, engine, engine_ending_with, bundle, rewrite
    ):
        free = tokens(engine)
        rewrite(bundle, "generation_config.json", b"{}")
        assert tokens(engine_ending_with(free[2], "config.json")) == free

    def test_the_generation_config_goes_before_the_models(self, engine, engine_ending_with):
        free = tokens(engine)
        engine_ending_with(free[1], "config.json")
        assert tokens(engine_ending_with(383)) == free

    def test_without_end_tokens_the_text_goes_on(self, engine_ending_with):
        engine_ending_with(None, "config.json")
        assert engine_ending_with(None).generate(token_ids=IDS, max_new_tokens=100).finish_reason == "length"

    @pytest.mark.parametrize("content", [b"", b"[]", b"text", b"\xff", b'"0"'])
    def test_a_generation_config_that_is_none_is_refused(self, bundle, rewrite, content):
        rewrite(bundle, "generation_config.json", content)
        with pytest.raises(BundleError, match=rf"^{bundle}/generation_config\.json: expected a JSON object, found"):
            prefix_runtime.load(bundle)

    @pytest.mark.parametrize("value", ["0", 1.5, [0, "1"], {"0": 1}, [[0]]])
    def test_an_end_token_that_is_none_is_refused(self, engine_ending_with, value):
        with pytest.raises(BundleError, match=r"generation_config\.json: eos_token_id: expected a token id or a list"):
            engine_ending_with(value)

    @pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 1), (4, 6), (10, 3)])
    @pytest.mark.parametrize("task", TASKS)
    def test_a_stop_string_ends_the_text_and_is_left_out(self, engine, task, start, length):
        free = engine.generate("the lazy dog", task=task, max_new_tokens=60)
        stop = free.text[start : start + length]
        for given_as in (stop, [stop], ("not there", stop)):
            result = engine.generate("the lazy dog", task=task, max_new_tokens=60, stop=given_as)
            assert result.text == free.text[: free.text.index(stop)]
            assert result.finish_reason == "stop"
            assert result.token_ids == free.token_ids[: len(result.token_ids)]
            assert len(result.token_ids) < 60

    def test_a_stop_string_of_several_tokens_ends_the_text(self, engine, tokenizer):
        free = engine.generate("the lazy dog", task="p3", max_new_tokens=60)
        stop = free.text[4:10]
        assert all(stop not in tokenizer.decode([token_id]) for token_id in free.token_ids)
        result = engine.generate("the lazy dog", task="p3", max_new_tokens=60, stop=stop)
        assert result.text == free.text[: free.text.index(stop)]

    def test_a_stop_string_that_does_not_come_changes_nothing(self, engine):
        free = engine.generate("the lazy dog", task="p3", max_new_tokens=30)
        result = engine.generate("the lazy dog", task="p3", max_new_tokens=30, stop=[free.text + "!", "zzz"])
        assert (result.text, result.token_ids, result.finish_reason) == (free.text, free.token_ids, "length")

    def test_a_stop_string_of_the_prompt_does_not_end_the_text(self, engine):
        stop = "the lazy dog"
        assert engine.generate(stop, max_new_tokens=5, stop=stop).finish_reason == "length"

    @pytest.mark.parametrize("place", [0, 3])
    def test_a_special_token_may_be_a_stop_string(self, engine, bundle, rewrite, place):
        free = tokens(engine, "p3")
        tokenizer = json.loads((bundle / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        name = next(token for token, token_id in vocab.items() if token_id == free[place])
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": free[place], "content": name})
        rewrite(bundle, "tokenizer.json", json.dumps(tokenizer).encode())
        marked = prefix_runtime.load(bundle, threads=1)
        stop = marked._codec._detokenizer.token_bytes(free[place]).decode()
        result = marked.generate(token_ids=IDS, task="p3", max_new_tokens=20, stop=stop)
        assert (result.token_ids, result.finish_reason) == (free[: free.index(free[place]) + 1], "stop")
        assert stop not in result.text

    def test_a_stop_string_that_begins_in_the_prompt_ends_the_text(self, engine, tokenizer):
        free = engine.generate("the lazy dog", task="p3", max_new_tokens=30)
        shown = [tokenizer.decode([token_id]) for token_id in free.token_ids]
        place = next(place for place in range(1, 30) if "".join(shown[place - 1 : place + 1]).isascii())
        prompt = [*tokenizer.encode("the lazy dog").ids, *free.token_ids[:place]]
        stop = shown[place - 1][-1] + shown[place]
        options = {"task": "p3", "max_new_tokens": 5, "stop": stop}
        result = engine.generate(token_ids=prompt, **options)
        assert (result.token_ids, result.text, result.finish_reason) == (free.token_ids[place : place + 1], "", "stop")

    @pytest.mark.parametrize(
        ("stop", "message"),
        [
            (["a"] * 65, "stop: expected at most 64 strings, found 65"),
            (["a", "b" * 257], r"stop\[1\]: expected at most 256 characters, found 257"),
            ("\ud800", r"stop\[0\]: expected Unicode text, found '\\ud800'"),
        ],
    )
    def test_stop_strings_beyond_the_bounds_are_refused(self, engine, stop, message):
        with pytest.raises(RequestError, match=f"^{message}"):
            engine.generate("a", stop=stop)

    def test_as_many_and_as_long_stop_strings_as_are_allowed_are_taken(self, engine):
        stop = [f"{place:02}" * 128 for place in range(64)]
        free = engine.generate("the lazy dog", max_new_tokens=5)
        assert engine.generate("the lazy dog", max_new_tokens=5, stop=stop).token_ids == free.token_ids

    @pytest.mark.parametrize("stop", [[""], "", ["a", ""], [3], [None], [b"a"], 3, True])
    def test_an_empty_stop_string_or_none_is_refused(self, engine, stop):
        with pytest.raises(RequestError, match="stop: expected strings of at least one character, found"):
            engine.generate("a", stop=stop)


class TestEmptyPrompts:
    @pytest.mark.parametrize("task", TASKS)
    def test_one_is_the_start_token_that_the_tokenizer_adds(self, starting_bundle, task):
        engine = prefix_runtime.load(starting_bundle, threads=1)
        found = engine.generate("", task=task, max_new_tokens=9)
        assert found.token_ids == engine.generate(token_ids=[0], task=task, max_new_tokens=9).token_ids
        assert found.metrics.prompt_length == 1
        texts = [row.text for row in engine.generate(["", "the"], task=task, max_new_tokens=9)]
        assert texts[0] == found.text == "".join(chunk.text for chunk in engine.stream("", task=task, max_new_tokens=9))

    def test_one_is_refused_if_the_tokenizer_adds_none(self, engine):
        message = (
            "^prompt: expected at least one token, found none: the tokenizer adds none to this text; give text, or"
        )
        with pytest.raises(RequestError, match=message):
            engine.generate("")


class TestWithoutTokenizer:
    def test_token_ids_are_answered_without_text(self, bare):
        result = bare.generate(token_ids=IDS, task="p3", max_new_tokens=4)
        assert (result.text, len(result.token_ids)) == (None, 4)

    @pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
    def test_a_text_prompt_is_refused(self, bare, prompt):
        with pytest.raises(RequestError, match=r"prompt: .* has no tokenizer: expected token_ids, found text"):
            bare.generate(prompt)

    def test_tokens_are_streamed_without_text(self, bare):
        chunks = list(bare.stream(token_ids=IDS, max_new_tokens=4))
        assert [chunk.text for chunk in chunks] == [""] * 4
        assert tuple(chunk.token_id for chunk in chunks) == tokens(bare, count=4)
        assert chunks[-1].result.text is None

    def test_stop_strings_are_refused(self, bare):
        with pytest.raises(RequestError, match=r"stop: .* has no tokenizer"):
            bare.generate(token_ids=IDS, stop="a")


class TestSampling:
    @pytest.mark.parametrize("task", TASKS)
    def test_the_most_likely_of_one_is_greedy(self, engine, task):
        assert tokens(engine, task, sampling=Sampling(temperature=2, top_k=1)) == tokens(engine, task)

    @pytest.mark.parametrize("seed", [0, 1, 12345])
    def test_the_same_seed_gives_the_same_text(self, engine, seed):
        sampling = Sampling(**SAMPLING, seed=seed)
        one, other = (engine.generate("the", task="p3", max_new_tokens=30, sampling=sampling) for _ in range(2))
        assert (one.text, one.token_ids) == (other.text, other.token_ids)

    def test_other_seeds_give_other_texts(self, engine):
        texts = {tokens(engine, sampling=Sampling(**SAMPLING, seed=seed)) for seed in range(8)}
        assert len(texts) == 8

    def test_without_a_seed_texts_differ(self, engine):
        assert len({tokens(engine, sampling=Sampling(**SAMPLING)) for _ in range(4)}) == 4

    def test_a_repetition_penalty_is_that_of_transformers(self, bare, workshop):
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(workshop.model()).eval()
        ids = torch.tensor([IDS])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, repetition_penalty=1.7, pad_token_id=0
        )
        found = tokens(bare, count=30, sampling=Sampling(repetition_penalty=1.7))
        assert found == tuple(expected[0, len(IDS) :].tolist()) != tokens(bare, count=30)


class TestLogits:
    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("length", [1, 5])
    def test_the_most_likely_tokens_are_those_that_are_generated(self, engine, task, length):
        prompt, found = IDS[:length], []
        for _ in range(6):
            logits = engine.logits([*prompt, *found], task)
            assert (logits.shape, logits.dtype) == ((length + len(found), 384), np.float32)
            found.append(int(logits[-1].argmax()))
        expected = engine.generate(token_ids=prompt, task=task, max_new_tokens=6).token_ids
        assert tuple(found[: len(expected)]) == expected

    def test_they_are_those_of_transformers(self, engine, workshop):
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(workshop.model(tokenizer=True)).eval()
        with torch.no_grad():
            expected = model(torch.tensor([IDS])).logits[0].numpy()
        np.testing.assert_allclose(engine.logits(IDS), expected, rtol=0, atol=1e-4)

    def test_they_are_the_callers_own(self, engine):
        first = engine.logits(IDS, "p3")
        kept = first.copy()
        engine.logits([9, 9, 9], "p3")
        np.testing.assert_array_equal(first, kept)

    @pytest.mark.parametrize(
        ("ids", "task", "error"),
        [
            ([], None, RequestError),
            ([384], None, RequestError),
            ("ab", None, RequestError),
            ([[1]], None, RequestError),
            (IDS, "p4", UnknownTaskError),
        ],
    )
    def test_a_wrong_request_is_refused(self, engine, ids, task, error):
        with pytest.raises(error):
            engine.logits(ids, task)


class TestMetrics:
    @pytest.mark.parametrize(("task", "length"), [(None, 0), ("p3", 3), ("p20", 20)])
    @pytest.mark.parametrize("count", [1, 2, 9])
    def test_they_count_and_add_up(self, bare, task, length, count):
        metrics = bare.generate(token_ids=IDS, task=task, max_new_tokens=count).metrics
        assert (metrics.prompt_length, metrics.prefix_length, metrics.new_tokens) == (len(IDS), length, count)
        assert len(metrics.inter_token_latencies) == count - 1
        assert all(latency > 0 for latency in metrics.inter_token_latencies)
        assert 0 < metrics.task_selection < metrics.time_to_first_token
        assert metrics.seconds == pytest.approx(metrics.time_to_first_token + sum(metrics.inter_token_latencies))
        assert metrics.tokens_per_second == pytest.approx(count / metrics.seconds)

    def test_the_latency_is_the_median_of_the_steps(self, bare):
        metrics = bare.generate(token_ids=IDS, max_new_tokens=8).metrics
        assert metrics.inter_token_latency == np.median(metrics.inter_token_latencies)

    def test_where_there_was_no_step_there_is_no_latency(self, bare):
        assert math.isnan(bare.generate(token_ids=IDS, max_new_tokens=1).metrics.inter_token_latency)


class TestTasks:
    def test_they_are_the_bundles_sorted(self, engine):
        assert engine.tasks == ("p20", "p3")

    def test_each_task_is_answered_in_its_own_way(self, engine):
        assert len({tokens(engine, task) for task in TASKS}) == 3

    @pytest.mark.parametrize("task", ["p4", "", "P3", "../p3"])
    def test_an_unknown_task_is_refused_and_the_known_are_listed(self, engine, task):
        for ask in (tokens, lambda engine, task: engine.room(task), lambda engine, task: engine.logits(IDS, task)):
            with pytest.raises(UnknownTaskError, match=f"task '{task}': .*tasks here: p20, p3$"):
                ask(engine, task)

    @pytest.mark.parametrize("given_as", ["prefix", "path", "text"])
    def test_an_added_task_answers_at_once(self, own, bundle, make_prefix, tmp_path, given_as):
        prefix, path = make_prefix(9), tmp_path / "new.safetensors"
        prefix.save(path)
        own.add_task("new", {"prefix": prefix, "path": path, "text": str(path)}[given_as])
        assert own.tasks == ("new", "p20", "p3")
        # The same prefix in a bundle on the disk gives the same answer.
        Bundle.open(bundle).add_task("new", prefix)
        assert tokens(own, "new") == tokens(prefix_runtime.load(bundle, threads=1), "new")
        assert tokens(own, "new") not in {tokens(own, task) for task in TASKS}

    def test_a_float16_prefix_answers_as_the_same_numbers_in_float32(self, own, make_prefix):
        half = make_prefix(9, dtype=np.float16)
        layers = tuple(
            prefix_runtime.LayerPrefix(layer.key.astype(np.float32), layer.value.astype(np.float32))
            for layer in half.sites["decoder"]
        )
        own.add_task("half", half)
        own.add_task("single", prefix_runtime.Prefix({"decoder": layers}, position_base=9))
        np.testing.assert_array_equal(own.logits(IDS, "half"), own.logits(IDS, "single"))

    @pytest.mark.parametrize(
        ("name", "shape", "error"),
        [
            ("p3", {}, DuplicateTaskError),
            ("P3", {}, DuplicateTaskError),
            ("a/b", {}, TaskNameError),
            ("..", {}, TaskNameError),
            ("new", {"heads": 3}, PrefixMismatchError),
            ("new", {"base_fingerprint": "sha256:other"}, PrefixMismatchError),
        ],
    )
    def test_a_wrong_task_is_refused_and_the_tasks_stay(self, own, make_prefix, name, shape, error):
        with pytest.raises(error):
            own.add_task(name, make_prefix(**shape))
        assert own.tasks == ("p20", "p3")

    def test_a_file_that_is_no_prefix_is_refused(self, own, tmp_path):
        with pytest.raises(PrefixError, match="no such file"):
            own.add_task("new", tmp_path / "missing.safetensors")

    def test_a_removed_task_is_unknown_and_its_buffers_are_free(self, own):
        tokens(own, "p3")
        own.remove_task("p3")
        assert own.tasks == ("p20",)
        assert own._pool._idle == []
        with pytest.raises(UnknownTaskError, match=r"tasks here: p20$"):
            tokens(own, "p3")
        with pytest.raises(UnknownTaskError, match="task 'p3'"):
            own.remove_task("p3")

    def test_a_name_that_was_taken_anew_answers_with_its_new_prefix(self, own, make_prefix):
        before = tokens(own, "p3")
        own.remove_task("p3")
        own.add_task("p3", make_prefix(3, seed=5))
        after = tokens(own, "p3")
        own.add_task("other", make_prefix(3, seed=5))
        assert after == tokens(own, "other") != before

    def test_an_engine_does_not_see_changes_to_the_folder(self, bundle, make_prefix):
        engine = prefix_runtime.load(bundle, threads=1)
        before = [tokens(engine, task) for task in TASKS]
        changed = Bundle.open(bundle)
        changed.remove_task("p3")
        changed.add_task("p3", make_prefix(3, seed=5))
        changed.add_task("new", make_prefix(4))
        assert engine.tasks == ("p20", "p3")
        assert [tokens(engine, task) for task in TASKS] == before
        shutil.rmtree(bundle)
        assert [tokens(engine, task) for task in TASKS] == before

    def test_a_task_whose_file_is_gone_before_it_was_read_is_told(self, bundle):
        engine = prefix_runtime.load(bundle, threads=1)
        Bundle.open(bundle).remove_task("p3")
        with pytest.raises(PrefixError, match=r"p3\.safetensors: expected .*, found no such file"):
            tokens(engine, "p3")
        assert tokens(engine, "p20")

    def test_selecting_among_a_hundred_tasks_gives_each_its_own(self, own, make_prefix):
        for seed in range(100):
            own.add_task(f"t{seed}", make_prefix(2, seed=seed))
        assert len(own.tasks) == 102
        first = {seed: own.logits(IDS, f"t{seed}") for seed in (0, 50, 99)}
        for seed in range(100):
            own.logits(IDS, f"t{seed}")
        for seed, logits in first.items():
            np.testing.assert_array_equal(own.logits(IDS, f"t{seed}"), logits)


class TestThreads:
    def test_what_many_threads_get_is_what_each_gets_alone(self, shared_bundle, engine):
        requests = [
            {"token_ids": [5 + index, 6, 7][: 1 + index % 3], "task": TASKS[index % 3], "max_new_tokens": 5 + index % 7}
            for index in range(48)
        ]
        expected = [engine.generate(**request).token_ids for request in requests]
        shared = prefix_runtime.load(shared_bundle, threads=1)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda request: shared.generate(**request).token_ids, requests))
        assert found == expected
        assert shared._pool.lent_bytes == 0

    def test_a_small_budget_changes_nothing_but_the_memory(self, shared_bundle, engine):
        starved = prefix_runtime.load(shared_bundle, threads=1, cache_bytes=0)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda task: tokens(starved, task), TASKS * 8))
        assert found == [tokens(engine, task) for task in TASKS] * 8
        assert starved._pool._idle == []

    def test_tasks_come_and_go_while_others_run(self, own, make_prefix):
        expected = tokens(own, "p3")

        def come_and_go(index):
            own.add_task(f"t{index}", make_prefix(2, seed=index))
            found = own.generate(token_ids=IDS, task=f"t{index}", max_new_tokens=3)
            own.remove_task(f"t{index}")
            return len(found.token_ids)

        with ThreadPoolExecutor(8) as threads:
            others = [threads.submit(come_and_go, index) for index in range(20)]
            found = list(threads.map(lambda _: tokens(own, "p3"), range(20)))
        assert found == [expected] * 20
        assert all(other.result() > 0 for other in others)
        assert own.tasks == ("p20", "p3")


class TestLoading:
    @pytest.mark.parametrize("threads", [None, 1, 2])
    def test_the_number_of_threads_changes_no_token(self, shared_bundle, engine, threads):
        assert tokens(prefix_runtime.load(str(shared_bundle), threads=threads)) == tokens(engine)

    @pytest.mark.parametrize("threads", [0, -1, 513, 1.5, "2", True])
    def test_no_threads_are_refused(self, shared_bundle, threads):
        with pytest.raises(ProviderError, match=f"threads: expected 1 to 512, found {threads!r}"):
            prefix_runtime.load(shared_bundle, threads=threads)

    @pytest.mark.parametrize("provider", ["tpu", "", "CPU", "CPUExecutionProvider", None, ["cpu"]])
    def test_an_unknown_provider_is_refused_and_the_known_are_listed(self, shared_bundle, provider):
        with pytest.raises(ProviderError, match=f"provider: expected one of cpu.*, found {re.escape(repr(provider))}"):
            prefix_runtime.load(shared_bundle, provider=provider)

    @pytest.mark.parametrize("name", ["model.onnx.data", "prefixes/p20.safetensors", "config.json"])
    def test_a_changed_file_is_found_when_it_is_asked_for(self, bundle, name):
        content = bytearray((bundle / name).read_bytes())
        content[-9] ^= 1
        (bundle / name).write_bytes(content)
        with pytest.raises(BundleIntegrityError, match=f"^{bundle / name}: expected SHA-256 .*, found .*"):
            prefix_runtime.load(bundle, verify=True)

    def test_a_whole_bundle_is_verified(self, shared_bundle, engine):
        assert tokens(prefix_runtime.load(shared_bundle, threads=1, verify=True)) == tokens(engine)

    def test_no_bundle_is_refused(self, tmp_path):
        with pytest.raises(BundleError, match=f"^{tmp_path}: expected a bundle"):
            prefix_runtime.load(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"no graph"])
    def test_a_graph_that_is_none_is_refused(self, bundle, rewrite, content):
        rewrite(bundle, "model.onnx", content)
        with pytest.raises(ProviderError, match=rf"^{bundle}/model\.onnx: onnxruntime .* cannot open the graph: "):
            prefix_runtime.load(bundle)

    def test_a_tokenizer_that_is_none_is_refused(self, bundle, rewrite):
        rewrite(bundle, "tokenizer.json", b"{}")
        with pytest.raises(BundleError, match=rf"^{bundle}/tokenizer\.json: expected a tokenizer"):
            prefix_runtime.load(bundle)

    def test_the_engine_tells_its_bundle(self, engine, shared_bundle):
        assert engine.bundle.root == shared_bundle


@pytest.fixture(scope="module", params=[1, 2, 3, 8])
def batching(shared_bundle, request):
    return prefix_runtime.load(shared_bundle, threads=1, max_batch=request.param)


class TestBatches:
    """A list of prompts: each answered as if it were alone."""

    PROMPTS = ("the quick", "a", "brown fox jumps over the lazy dog", "fox", "the lazy dog jumps")
    TASKS = ("p3", None, "p20", "p3", "p20")
    COUNTS = (9, 1, 17, 30, 4)

    def alone(self, engine, **options):
        rows = zip(self.PROMPTS, self.TASKS, self.COUNTS, strict=True)
        return [engine.generate(prompt, task=task, max_new_tokens=count, **options) for prompt, task, count in rows]

    def together(self, engine, **options):
        return engine.generate(list(self.PROMPTS), task=list(self.TASKS), max_new_tokens=list(self.COUNTS), **options)

    def same(self, left, right):
        for field in ("text", "token_ids", "finish_reason", "task"):
            assert [getattr(row, field) for row in left] == [getattr(row, field) for row in right]

    def test_rows_are_answered_as_if_each_were_alone(self, engine, batching):
        for _ in range(2):  # the second time in buffers that were used before, rows moved about
            self.same(self.together(batching), self.alone(engine))

    def test_sampled_rows_follow_their_own_seeds(self, engine, batching):
        sampling = [None if seed == 1 else Sampling(temperature=1.5, top_k=40, seed=seed) for seed in range(5)]
        rows = zip(self.PROMPTS, self.TASKS, self.COUNTS, sampling, strict=True)
        alone = [engine.generate(text, task=task, max_new_tokens=n, sampling=how) for text, task, n, how in rows]
        self.same(self.together(batching, sampling=sampling), alone)

    def test_rows_that_end_early_leave(self, engine, batching):
        stop = sorted({row.text[:2] for row in self.alone(engine) if row.text})[:2]
        self.same(self.together(batching, stop=stop), self.alone(engine, stop=stop))

    def test_lengths_and_times_are_each_rows_own(self, batching):
        for row, count in zip(self.together(batching, ignore_end=True), self.COUNTS, strict=True):
            assert row.metrics.new_tokens == count
            assert len(row.metrics.inter_token_latencies) == count - 1
            assert min(row.metrics.time_to_first_token, *row.metrics.inter_token_latencies, 1) > 0

    @pytest.mark.parametrize("option", ["max_new_tokens", "sampling"])
    def test_a_list_of_options_has_one_for_each_prompt(self, engine, option):
        with pytest.raises(RequestError, match=f"{option}: expected one, or one for each of the 5 prompts, found 2"):
            engine.generate(list(self.PROMPTS), **{option: [None, None]})

    def test_a_list_of_options_is_refused_for_a_single_prompt(self, engine):
        with pytest.raises(RequestError, match="max_new_tokens: expected a whole number"):
            engine.generate("a", max_new_tokens=[3])
        with pytest.raises(RequestError, match="sampling: expected a Sampling"):
            engine.generate("a", sampling=[Sampling()])

    def test_what_is_wrong_with_one_row_is_told_before_any_is_run(self, engine):
        with pytest.raises(RequestError, match=r"^row 1 of the list: max_new_tokens: expected a whole number"):
            engine.generate(["a", "b"], max_new_tokens=[3, 0])
        with pytest.raises(RequestError, match=r"^row 1 of the list: prompt: expected at least one token, found none"):
            engine.generate(["a", ""])
        with pytest.raises(UnknownTaskError, match=r"^row 0 of the list: .*nowhere"):
            engine.generate(["a", "b"], task=["nowhere", None])

    @pytest.mark.parametrize("rows", [0, 1.5, "8", None, True])
    def test_a_batch_has_room_for_a_row(self, shared_bundle, rows):
        with pytest.raises(RequestError, match=f"max_batch: expected a whole number, 1 or more, found {rows!r}"):
            prefix_runtime.load(shared_bundle, max_batch=rows)

    @pytest.mark.parametrize("size", [-1, 1e9, "1", None, True])
    def test_buffers_take_a_whole_number_of_bytes(self, shared_bundle, size):
        with pytest.raises(RequestError, match=f"cache_bytes: expected a whole number, 0 or more, found {size!r}"):
            prefix_runtime.load(shared_bundle, cache_bytes=size)

    @pytest.mark.parametrize("task", [["p3"], [None], 3, b"p3"])
    def test_a_single_prompt_has_a_single_task(self, engine, task):
        with pytest.raises(RequestError, match=re.escape(f"task: expected the name of one, or None, found {task!r}")):
            engine.generate("a", task=task)

    @pytest.mark.parametrize(("task", "found"), [(3, "expected one, or"), ([3, None], "expected the name of one, or")])
    def test_tasks_of_a_list_are_names(self, engine, task, found):
        with pytest.raises(RequestError, match=f"task: {found}"):
            engine.generate(["a", "b"], task=task)

    @pytest.mark.parametrize("ids", [np.array(5), [np.array(5), np.array(6)], None, 5])
    def test_what_is_no_list_of_ids_is_refused(self, engine, ids):
        for ask in (engine.generate, engine.logits):
            with pytest.raises(RequestError):
                ask(token_ids=ids)

    @pytest.mark.parametrize("prefix", [5, None, b"p"])
    def test_what_is_no_prefix_makes_no_task(self, shared_bundle, prefix):
        engine = prefix_runtime.load(shared_bundle)
        with pytest.raises(PrefixError, match="task 'x': expected a prefix or a file of one, found"):
            engine.add_task("x", prefix)
        with pytest.raises(PrefixError, match="task 'x': expected a Prefix, found"):
            engine.bundle.add_task("x", prefix)
        assert engine.bundle.tasks == ("p20", "p3")

    def test_a_misspelt_option_of_no_prompts_is_refused_too(self, engine):
        assert engine.generate([]) == []
        with pytest.raises(TypeError, match="max_tokens"):
            engine.generate([], max_tokens=3)

    def test_a_manifest_of_another_model_than_the_graphs_is_told_by_the_input(self, shared_bundle, tmp_path):
        folder = shutil.copytree(shared_bundle, tmp_path / "bundle")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["geometry"]["sites"]["decoder"] *= 2
        (folder / "manifest.json").write_text(json.dumps({**manifest, "tasks": {}, "parity": None}))
        with pytest.raises(ProviderError, match=r"the graph has no input 'past_key_values\.3\.key'"):
            prefix_runtime.load(folder).generate("a")

    def test_what_is_neither_text_nor_a_list_is_no_prompt(self, engine):
        with pytest.raises(RequestError, match="prompt: expected text or a list of texts"):
            engine.generate(3)
        with pytest.raises(RequestError, match="token_ids: expected whole numbers, found 3"):
            engine.generate(token_ids=3)


def test_end_tokens_may_be_ignored(shared_bundle, rewrite, tmp_path):
    folder = shutil.copytree(shared_bundle, tmp_path / "bundle")
    first = prefix_runtime.load(folder, threads=1).generate(token_ids=IDS, max_new_tokens=3).token_ids[0]
    rewrite(folder, "generation_config.json", json.dumps({"eos_token_id": first}).encode())
    engine = prefix_runtime.load(folder, threads=1)
    assert engine.generate(token_ids=IDS, max_new_tokens=3).finish_reason == "end_token"
    ignored = engine.generate(token_ids=IDS, max_new_tokens=3, ignore_end=True)
    assert (len(ignored.token_ids), ignored.finish_reason) == (3, "length")


def test_buffers_of_a_task_that_was_removed_meanwhile_are_let_go_of(shared_bundle, make_prefix):
    engine = prefix_runtime.load(shared_bundle, threads=1)
    engine.add_task("gone", make_prefix())
    chunks = engine.stream(token_ids=IDS, task="gone", max_new_tokens=4)
    engine.remove_task("gone")
    assert len(list(chunks)) == 4
    assert engine._pool._idle == []


def test_prompts_may_come_from_a_generator(engine):
    assert len(engine.generate((text for text in ("a", "b")), max_new_tokens=1)) == 2


def test_ignore_end_is_a_truth_value(engine):
    with pytest.raises(RequestError, match="ignore_end: expected True or False"):
        engine.generate(["a", "b"], ignore_end=[True, False])


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"precision": "int4", "cache": "int8"}])
def test_rows_of_rounded_bundles_are_answered_as_if_each_were_alone(workshop, options):
    engine = prefix_runtime.load(workshop.bundle(**options), threads=1)
    prompts, tasks = ["the quick", "a", "brown fox jumps", "dog"], ["p3", None, "p20", "p3"]
    alone = [engine.generate(text, task=task, max_new_tokens=12) for text, task in zip(prompts, tasks, strict=True)]
    together = engine.generate(prompts, task=tasks, max_new_tokens=12)
    assert [row.token_ids for row in together] == [row.token_ids for row in alone]
