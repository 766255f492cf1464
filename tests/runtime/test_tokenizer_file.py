"""Tokenizer files from outside: what no tokenizer needs is refused, and a failure inside the library is our error."""

from __future__ import annotations

import json
import os

import pytest
from tokenizers import Tokenizer, models

from prefix_runtime import BundleError
from prefix_runtime.generation import tokenizer_file
from prefix_runtime.generation.text import TextCodec
from prefix_runtime.generation.tokenizer_file import open_tokenizer

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
ADDED = {"id": 2, "content": "aaaa", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
         "special": False}  # fmt: skip


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(single, **special):
    pair = [SEQUENCE, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def tokens(name, count):
    return {name: {"id": name, "ids": [1] * count, "tokens": ["x"] * count}}


def many(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


def with_parts(**parts):
    """The file of a tokenizer of two letters that has these parts."""
    plain = json.loads(Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).to_str())
    return json.dumps({**plain, **parts})


@pytest.fixture
def write(tmp_path):
    def write_file(content):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": many("normalizers", *[DOUBLE] * 40)}, "normalizer: expected text to grow at most 1024 times"),
        ({"normalizer": {**DOUBLE, "content": "a" * 2000}}, "normalizer: expected text to grow"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 2000}}, "normalizer: expected text to grow"),
        ({"normalizer": many("normalizers", *[{"type": "ByteLevel"}] * 40)}, "normalizer: expected text to grow"),
        ({"normalizer": many("normalizers", many("normalizers", *[DOUBLE] * 11))}, "normalizer: expected text to grow"),
        ({"normalizer": many("normalizers", *[{"type": "NFC"}] * 300)}, "normalizer: expected at most 256 components"),
        ({"pre_tokenizer": many("pretokenizers", *[BYTES] * 40)}, "pre_tokenizer: expected text to grow"),
        ({"pre_tokenizer": split("a|" * 20_000 + "b")}, "pre_tokenizer: expected a pattern of at most 16384"),
        ({"decoder": many("decoders", *[DOUBLE] * 40)}, "decoder: expected text to grow"),
        ({"post_processor": many("processors", *[template([SEQUENCE] * 2)] * 11)}, "post_processor: expected text to"),
        (
            {"post_processor": template([{"SpecialToken": {"id": "x", "type_id": 0}}] * 9, **tokens("x", 99))},
            "post_processor: expected at most 256 special tokens to add, found 891",
        ),
        (
            {"model": {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
                       "max_input_chars_per_word": 10_000_000, "vocab": {"a": 0}}},
            "max_input_chars_per_word: expected at most 1000, found 10000000",
        ),
    ],
)  # fmt: skip
def test_what_would_take_all_memory_or_time_is_refused(write, parts, message):
    path = write(with_parts(**parts))
    with pytest.raises(BundleError, match=f"^{path}: {message}"):
        open_tokenizer(path)


@pytest.mark.parametrize(
    "hide",
    [
        lambda text: text,
        lambda text: text.replace('"normalizer"', r'"\u006eormalizer"'),
        lambda text: text[:-1] + ', "normalizer": null}',
        lambda text: text.replace('"normalizer": ', '"normalizer"\n\t:\r\n '),
    ],
)
def test_a_normalizer_that_explodes_over_an_added_token_is_refused_before_it_is_loaded(write, hide):
    text = with_parts(normalizer=many("normalizers", *[DOUBLE] * 60), added_tokens=[ADDED])
    with pytest.raises(BundleError, match="normalizer: expected text to grow"):
        open_tokenizer(write(hide(text)))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # panics
        {"normalizer": {"type": "Replace"}},
        {"normalizer": [[[1]]]},
        {"normalizer": "x"},
        {"pre_tokenizer": split("(")},
        {"pre_tokenizer": split("(" * 200 + "a" + ")" * 20_000)},
        {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]], "byte_fallback": False}},
    ],
)
def test_parts_that_are_none_are_refused(write, parts):
    path = write(with_parts(**parts))
    with pytest.raises(BundleError, match=f"^{path}: expected a tokenizer, found a file that is none: "):
        open_tokenizer(path)


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"normalizer": ' + b'{"normalizers": [' * 100_000, b"null"])
def test_a_file_of_another_shape_is_refused(write, content):
    with pytest.raises(BundleError, match="expected a tokenizer, found a file that is none"):
        open_tokenizer(write(content))


@pytest.mark.parametrize(
    ("parts", "text", "found"),
    [
        ({"pre_tokenizer": split("(a+)+$")}, "a" * 40 + "!", "Onig: Regex search error: retry-limit-in-match over"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "ab", "chunk size must be non-zero"),
        ({"post_processor": template([{"SpecialToken": {"id": "x", "type_id": 0}}])}, "a", "no entry found for key"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "u"}}, "q", "WordLevel error: Missing"),
    ],
)
def test_a_tokenizer_that_panics_or_fails_on_a_text_is_our_error(write, parts, text, found):
    path = write(with_parts(**parts))
    with pytest.raises(BundleError, match=f"^{path}: expected a tokenizer that works, found one that fails: {found}"):
        TextCodec(path).encode(text)


def test_a_decoder_that_panics_is_our_error_at_each_place(write):
    path = write(with_parts(decoder={"type": "Strip", "content": "a", "start": 0, "stop": 5}))
    codec = TextCodec(path)
    for decode in (lambda: codec.decode([0]), lambda: codec.growing_text().push(0)):
        with pytest.raises(BundleError, match="found one that fails: index out of bounds"):
            decode()


def test_an_interrupt_is_no_failure(write):
    with pytest.raises(KeyboardInterrupt), tokenizer_file.refusing_failures(write("")):
        raise KeyboardInterrupt


def test_a_file_that_is_too_large_is_not_read(write, monkeypatch):
    path = write(with_parts())
    open_tokenizer(path)
    monkeypatch.setattr(tokenizer_file, "MAX_TOKENIZER_BYTES", path.stat().st_size - 1)
    with pytest.raises(BundleError, match="expected a tokenizer of at most 0 MiB, found more"):
        open_tokenizer(path)


def test_added_tokens_beyond_the_bound_are_refused(write, monkeypatch):
    path = write(with_parts(added_tokens=[ADDED]))
    monkeypatch.setattr(tokenizer_file, "MAX_ADDED_TOKENS", 0)
    with pytest.raises(BundleError, match="expected at most 0 added tokens, found 1"):
        open_tokenizer(path)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match="expected a tokenizer, found no regular file"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_the_name_of_a_part_may_be_a_token(write):
    model = {"type": "WordLevel", "vocab": {"normalizer": 0, '"normalizer":': 1, "u": 2}, "unk_token": "u"}
    assert TextCodec(write(with_parts(model=model))).encode("normalizer") == [0]


class TestSettings:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[]", "expected a JSON object, found list"),
            ("{", "expected a JSON object, found text that is none"),
            ("[" * 100_000, "expected a JSON object, found text that is none"),
            ('{"split_special_tokens": "no"}', "split_special_tokens: expected true or false, found 'no'"),
            ('{"clean_up_tokenization_spaces": [1]}', "clean_up_tokenization_spaces: expected true or false"),
        ],
    )
    def test_settings_that_are_none_are_refused(self, write, tmp_path, content, message):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(BundleError, match=rf"tokenizer_config\.json: {message}"):
            TextCodec(write(with_parts()), tmp_path / "tokenizer_config.json")

    def test_other_settings_and_null_are_left_alone(self, write, tmp_path):
        (tmp_path / "tokenizer_config.json").write_text('{"split_special_tokens": null, "chat_template": "x"}')
        assert TextCodec(write(with_parts()), tmp_path / "tokenizer_config.json").encode("ab") == [0, 1]
