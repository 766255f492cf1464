"""Real families of tokenizers: the runtime's ids, text and stop strings against transformers' own."""

from __future__ import annotations

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from prefix_export.errors import ModelError, PrefixExportError
from prefix_export.models import load_base_model, load_config
from prefix_export.prefixes.adapter_tokenizer import load_tokenizer
from prefix_export.tokenizers.tokenizer import ODD_TEXTS, odd_texts, save_tokenizer, tokenizer_warnings
from prefix_runtime import BundleError
from prefix_runtime.generation.text import TextCodec
from tests.tokenizer_families import FAMILIES, byte_level, gpt2, llama2, splitting, word_level

FALLS_BACK_TO_BYTES = {"gemma", "llama2", "mistral", "phi3"}
STOPPABLE = [family for family in FAMILIES if family is not word_level]  # transformers' criterion refuses its `[UNK]`


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Each family as transformers loads it, and as the runtime opens what the exporter saves of it."""
    kept = {}

    def make(family):
        if family not in kept:
            root = tmp_path_factory.mktemp(family.__name__)
            family(root / "base")
            theirs = AutoTokenizer.from_pretrained(root / "base")
            (root / "bundle").mkdir()
            save_tokenizer(theirs, root / "bundle")
            ours = TextCodec(root / "bundle" / "tokenizer.json", root / "bundle" / "tokenizer_config.json")
            kept[family] = SimpleNamespace(root=root, theirs=theirs, ours=ours)
        return kept[family]

    return make


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def pair(request, opened):
    return opened(request.param)


def grow(codec, ids, stop=(), prompt=()):
    """The text, how many tokens it took, and whether a stop string ended it."""
    text, chunks = codec.growing_text(stop, prompt), []
    for token_id in ids:
        chunks.append(text.push(token_id))
        if text.stopped:
            break
    else:
        chunks.append(text.finish())
    assert "".join(chunks) == text.text
    return text.text, min(len(chunks), len(ids)), text.stopped


def without_half_characters(text):
    return text.rstrip("\ufffd")


def test_token_ids_are_those_of_transformers(pair):
    for text in odd_texts(pair.theirs):
        assert pair.ours.encode(text) == pair.theirs(text)["input_ids"], text
        plain = pair.theirs(text, add_special_tokens=False)["input_ids"]
        assert pair.ours.encode(text, with_special_tokens=False) == plain, text


def test_text_is_that_of_transformers(pair):
    for text in odd_texts(pair.theirs):
        ids = pair.theirs(text)["input_ids"]
        expected = pair.theirs.decode(ids, skip_special_tokens=True)
        assert pair.ours.decode(ids) == expected, text
        assert grow(pair.ours, ids)[0] == without_half_characters(expected), text


def test_long_texts_grow_to_what_transformers_decodes_at_once(pair):
    pick = random.Random(0)
    for text in ["日本語😀é" * 40, "x n ' t 's . , " * 20, "   " * 40, "".join(pick.choices(ODD_TEXTS, k=12))]:
        ids = pair.theirs(text, add_special_tokens=False)["input_ids"]
        assert grow(pair.ours, ids)[0] == without_half_characters(pair.theirs.decode(ids, skip_special_tokens=True))


def test_random_tokens_grow_to_what_transformers_decodes_at_once(pair, request):
    pick = random.Random(1)
    ids = range(len(pair.theirs))
    if request.node.callspec.id in FALLS_BACK_TO_BYTES:
        # A byte that fits nowhere would undo characters that were given out before it came.
        ids = [each for each in ids if not pair.theirs.convert_ids_to_tokens(each).startswith("<0x")]
    for length in (5, 60, 300):
        row = pick.choices(ids, k=length)
        assert grow(pair.ours, row)[0] == without_half_characters(pair.theirs.decode(row, skip_special_tokens=True))


@pytest.mark.parametrize("family", STOPPABLE, ids=lambda family: family.__name__)
def test_stop_strings_end_an_answer_where_transformers_does(opened, family):
    pair = opened(family)
    pick = random.Random(2)
    tokens = list(pair.theirs.get_vocab())
    compared = 0
    for _ in range(25):
        row = pick.choices(range(len(tokens)), k=50)
        prompt, new = row[:10], row[10:]
        at = pick.randrange(36)
        shown = pair.theirs.decode(new[at : at + 3]).replace("\ufffd", "")
        stop = [text for text in (shown[1:7], pick.choice(tokens)) if text]
        expected = StopStringCriteria(pair.theirs, stop)
        ends = (n for n in range(1, 41) if expected(torch.tensor([prompt + new[:n]]), None)[0])
        first = next(ends, None)
        _, count, stopped = grow(pair.ours, new, stop, prompt)
        assert (count if stopped else None) == first, stop
        compared += first is not None
    assert compared > 5


@pytest.mark.parametrize("family", STOPPABLE, ids=lambda family: family.__name__)
def test_a_special_token_ends_the_text_before_it(opened, family):
    pair = opened(family)
    special = next(token for token in pair.theirs.all_special_tokens if token in pair.theirs.get_added_vocab())
    before = pair.theirs("the quick fox", add_special_tokens=False)["input_ids"]
    ids = [*before, pair.theirs.convert_tokens_to_ids(special), *before]
    text, count, stopped = grow(pair.ours, ids, [special])
    assert (text, count, stopped) == (pair.ours.decode(before), len(before) + 1, True)


def test_a_stop_string_may_begin_in_the_prompt(opened):
    pair = opened(llama2)
    prompt, new = (pair.theirs(text, add_special_tokens=False)["input_ids"] for text in ("Q: 1\n", "\nand more"))
    assert grow(pair.ours, new, ["\n\n"])[2] is False
    newline = new[pair.theirs.convert_ids_to_tokens(new).index("\n") :]
    assert grow(pair.ours, newline, ["\n\n"], prompt) == ("", 1, True)


def test_the_work_for_a_token_does_not_grow_with_the_text(opened, monkeypatch):
    pair = opened(llama2)
    ids = pair.theirs("the quick brown fox, 日本語 😀😀 " * 100)["input_ids"]
    text, sizes = pair.ours.growing_text(["never there"]), []
    decode = text._detokenizer.decode
    monkeypatch.setattr(text._detokenizer, "decode", lambda row: sizes.append(len(row)) or decode(row))
    for token_id in ids:
        text.push(token_id)
    assert len(ids) > 1000
    assert max(sizes) < 64
    assert len(sizes) < 2 * len(ids)


class TestWhatTheRuntimeCannotDo:
    def test_the_families_need_no_warning(self, pair):
        assert tokenizer_warnings(pair.root / "bundle", pair.theirs) == ()

    def test_a_model_without_a_tokenizer_needs_none(self, tmp_path):
        assert tokenizer_warnings(tmp_path, None) == ()

    def test_a_tokenizer_that_runs_in_python_is_told(self, tmp_path):
        tokenizer = ByT5Tokenizer()
        save_tokenizer(tokenizer, tmp_path)
        (line,) = tokenizer_warnings(tmp_path, tokenizer)
        assert line.startswith("the tokenizer is transformers' ByT5Tokenizer, which runs in Python")
        assert "the bundle takes token ids, not text" in line

    @pytest.mark.parametrize(
        ("method", "shown"), [("_decode", "token ids "), ("_encode_plus", "'Hello, world!' has token ids ")]
    )
    def test_a_class_that_computes_something_of_its_own_is_told(self, tmp_path, method, shown):
        class Own(PreTrainedTokenizerFast):
            pass

        def changed(self, *arguments, **options):
            found = getattr(PreTrainedTokenizerFast, method)(self, *arguments, **options)
            return found.upper() if isinstance(found, str) else {"input_ids": found["input_ids"][::-1]}

        setattr(Own, method, changed)
        tokenizer = Own(tokenizer_object=byte_level(["<|end|>"]), eos_token="<|end|>")
        save_tokenizer(tokenizer, tmp_path)
        (line,) = tokenizer_warnings(tmp_path, tokenizer)
        assert line.startswith(f"the runtime's tokenizer differs from transformers' Own: {shown}")

    def test_settings_that_were_changed_in_memory_are_saved(self, opened, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(opened(gpt2).root / "base")
        tokenizer.split_special_tokens = True
        save_tokenizer(tokenizer, tmp_path)
        assert tokenizer_warnings(tmp_path, tokenizer) == ()
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["split_special_tokens"] is True


class TestLoading:
    @pytest.fixture
    def config(self, workshop):
        return load_config(str(workshop.model("gpt2")))

    def test_a_folder_needs_no_configuration(self, opened, config, tmp_path):
        base = opened(splitting).root / "base"
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((base / name).read_bytes())
        found = load_tokenizer(tmp_path, config)
        assert found("a<|end|>")["input_ids"] == opened(splitting).theirs("a<|end|>")["input_ids"]

    def test_a_folder_without_tokenizer_has_none(self, config, tmp_path):
        assert load_tokenizer(tmp_path, config) is None

    def test_code_of_the_folder_is_not_run(self, config, tmp_path):
        byte_level([]).save(str(tmp_path / "tokenizer.json"))
        own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
        (tmp_path / "own.py").write_text("raise SystemExit('run')")
        found = load_tokenizer(tmp_path, config)
        (tmp_path / "bundle").mkdir()
        save_tokenizer(found, tmp_path / "bundle")
        assert tokenizer_warnings(tmp_path / "bundle", found) == (
            "the tokenizer has code of its own (own.Own), which is never run: its token ids and text may differ",
        )

    @pytest.mark.parametrize("content", [b"{}", b'{"normalizer": ' + b"[" * 100_000, b"\xff"])
    def test_a_file_that_is_no_tokenizer_is_refused_before_transformers_reads_it(self, config, tmp_path, content):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(BundleError, match=r"tokenizer\.json: expected a tokenizer, found a file that is none"):
            load_tokenizer(tmp_path, config)

    def test_settings_that_transformers_fails_on_are_told_in_a_line(self, config, tmp_path):
        byte_level([]).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": 3}))
        with pytest.raises(PrefixExportError, match=rf"^{tmp_path}: expected a tokenizer that transformers can load"):
            load_tokenizer(tmp_path, config)


def test_a_start_token_of_the_post_processor_is_all_of_an_empty_prompt(tmp_path):
    tokenizer: Tokenizer = byte_level(["<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextCodec(tmp_path / "tokenizer.json").encode("") == [0]


def test_a_base_model_whose_tokenizer_panics_is_refused_in_a_line(workshop, tmp_path):
    model = shutil.copytree(workshop.model("gpt2", tokenizer=True), tmp_path / "model")
    state = json.loads((model / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (model / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ModelError, match=r"expected a tokenizer that transformers can load, found Precompiled"):
        load_base_model(str(model))
