"""Text that grows in whole characters and ends before a stop string, against the tokenizer's own `decode`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from prefix_runtime import BundleError, RequestError
from prefix_runtime.generation.detokenizer import Detokenizer
from prefix_runtime.generation.text import GrowingText, TextCodec

TEXTS = [
    "é€😀 naïve 你好",
    "the quick brown fox",
    "👩‍👩‍👧‍👦🇫🇷",
    "a",
    " \n\t ",
    "日本語 and ﷽",
    "e\u0301\u0301",
    "\u0000\u007f\u0080\u07ff\u0800\uffff\U00010000\U0010ffff",
]
WHOLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20)
ENDED = 0  # the tokenizer's special token


def grown(tokenizer, ids, stop=()):
    """The chunks of a text, one for each token until it is stopped and one for its end, and the text."""
    text, chunks = GrowingText(Detokenizer(tokenizer, Path("tokenizer.json")), stop), []
    for token_id in ids:
        chunks.append(text.push(token_id))
        if text.stopped:
            return chunks, text
    return [*chunks, text.finish()], text


def expected(tokenizer, ids, stop):
    """What the text must be: the whole decoded text as it is when it first holds a stop string, cut before it."""
    for count in range(1, len(ids) + 1):
        decoded = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        found = [decoded.find(string) for string in stop if string in decoded]
        if found:
            return decoded[: min(found)], count
    return tokenizer.decode(ids).rstrip("\ufffd"), len(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_chunk_holds_half_a_character_and_together_they_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    chunks, whole = grown(tokenizer, ids)
    assert "".join(chunks) == whole.text == tokenizer.decode(ids) == text
    assert not any("\ufffd" in chunk for chunk in chunks)


def test_these_texts_do_have_characters_of_several_tokens(tokenizer):
    # Otherwise the tests here would prove nothing.
    assert [len(tokenizer.encode(character).ids) for character in "é€😀"] == [2, 3, 4]


def test_a_character_is_given_with_its_last_token(tokenizer):
    chunks, _ = grown(tokenizer, tokenizer.encode("é€a😀").ids)
    assert chunks == ["", "é", "", "", "€", "a", "", "", "", "😀", ""]


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_character_that_never_becomes_whole_is_left_out(tokenizer, missing):
    _, text = grown(tokenizer, tokenizer.encode("ab😀").ids[:-missing])
    assert text.text == "ab"


def test_whole_characters_in_a_last_token_that_also_begins_another_are_kept():
    # The token `aâ` is the letter a and the first byte of three.
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "\u00e2": 1, "a\u00e2": 2}, merges=[("a", "\u00e2")]))
    tokenizer.decoder = decoders.ByteLevel()
    assert grown(tokenizer, [0, 2])[1].text == "aa"


@pytest.fixture(scope="module")
def fallback():
    """A tokenizer as Llama's: words after `▁`, and bytes where it has no token."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "a", "é", "▁fox"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def fallback_ids(text):
    return [1 + byte for byte in text.encode()]


@given(words=st.lists(st.one_of(WHOLE.map(fallback_ids), st.just([257]), st.just([260])), max_size=8))
def test_characters_of_a_tokenizer_that_falls_back_to_bytes_grow_to_what_it_decodes(fallback, words):
    ids = [token_id for word in words for token_id in word]
    chunks, text = grown(fallback, ids)
    assert "".join(chunks) == text.text == fallback.decode(ids)
    assert not any("\ufffd" in chunk for chunk in chunks)


@given(ids=st.lists(st.integers(1, 260), max_size=30))
def test_no_bytes_stand_in_the_way_of_what_follows_them(fallback, ids):
    # DecodeStream raises on some of these: a line feed, half a character, a word.
    chunks, text = grown(fallback, [*ids, 261])
    assert "".join(chunks) == text.text
    assert text.text.endswith("fox")


def test_bytes_that_are_no_character_are_given_once_another_follows(tokenizer):
    half, letter = tokenizer.encode("é").ids[:1], tokenizer.encode("a").ids
    chunks, _ = grown(tokenizer, half + letter)
    assert "".join(chunks) == tokenizer.decode(half + letter) == "\ufffda"


@given(text=WHOLE)
def test_any_text_grows_to_what_the_tokenizer_decodes(tokenizer, text):
    ids = tokenizer.encode(text).ids
    chunks, whole = grown(tokenizer, ids)
    assert "".join(chunks) == whole.text == tokenizer.decode(ids)
    assert not any("\ufffd" in chunk for chunk in chunks)


@given(ids=st.lists(st.integers(0, 300), max_size=30))
def test_any_tokens_grow_to_what_the_tokenizer_decodes(tokenizer, ids):
    chunks, whole = grown(tokenizer, ids)
    decoded = tokenizer.decode(ids)
    assert "".join(chunks) == whole.text
    assert decoded.startswith(whole.text)
    assert set(decoded[len(whole.text) :]) <= {"\ufffd"}


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(
    text=st.text(st.sampled_from("ab é€😀"), max_size=30),
    stop=st.lists(st.text(st.sampled_from("ab é€😀"), min_size=1, max_size=4), max_size=3),
)
def test_any_stop_strings_cut_where_the_decoded_text_has_them(tokenizer, text, stop):
    ids = tokenizer.encode(text).ids
    chunks, whole = grown(tokenizer, ids, stop)
    wanted, count = expected(tokenizer, ids, stop)
    assert "".join(chunks) == whole.text == wanted
    assert whole.stopped == any(string in tokenizer.decode(ids) for string in stop)
    assert not whole.stopped or len(chunks) == count


@given(text=WHOLE, stop=st.lists(WHOLE.filter(bool), max_size=2))
def test_nothing_of_a_stop_string_is_ever_given_out(tokenizer, text, stop):
    _, whole = grown(tokenizer, tokenizer.encode(text).ids, stop)
    assert not any(string in whole.text for string in stop)
    assert text.startswith(whole.text)


@pytest.mark.parametrize(
    ("text", "stop", "given_out"),
    [
        ("abc.def", ["."], "abc"),
        ("abc", ["abc"], ""),
        ("abc", ["c", "b"], "a"),
        ("ab\n\ncd", ["\n\n"], "ab"),
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("abab!", ["aba!", "bab"], "a"),
        ("l'é", ["é"], "l'"),
        ("x😀y", ["😀y"], "x"),
        ("abc", ["abcd"], "abc"),
        ("abc", ["C"], "abc"),
        ("a lazy dog barks", ["lazy dog"], "a "),
    ],
)
def test_the_text_ends_before_the_stop_string(tokenizer, text, stop, given_out):
    chunks, whole = grown(tokenizer, tokenizer.encode(text).ids, stop)
    assert "".join(chunks) == whole.text == given_out
    assert whole.stopped == any(string in text for string in stop)


def test_what_may_become_a_stop_string_is_held_back_until_it_is_certain(tokenizer):
    chunks, _ = grown(tokenizer, [tokenizer.token_to_id(letter) for letter in "xababc"], ["abac", "xx"])
    assert chunks == ["", "x", "", "", "ab", "abc", ""]


def test_what_was_held_back_is_given_at_the_end(tokenizer):
    chunks, text = grown(tokenizer, [tokenizer.token_to_id(letter) for letter in "xab"], ["abc"])
    assert chunks == ["x", "", "", "ab"]
    assert not text.stopped


def test_special_tokens_are_left_out(tokenizer):
    ids = tokenizer.encode("ab").ids
    chunks, text = grown(tokenizer, [ENDED, *ids[:1], ENDED, *ids[1:], ENDED])
    assert "".join(chunks) == text.text == "ab"
    assert tokenizer.decode([ENDED], skip_special_tokens=False) == "<|end|>"


@pytest.mark.parametrize("stop", ["<|end|>", "b<|end|>", "|end|"])
def test_a_special_tokens_text_stops(tokenizer, stop):
    chunks, text = grown(tokenizer, [*tokenizer.encode("ab").ids, ENDED, *tokenizer.encode("cd").ids], [stop])
    assert (text.text, text.stopped) == ("a" if stop[0] == "b" else "ab", True)
    assert "".join(chunks) == text.text


@pytest.mark.parametrize("text", [*TEXTS, "<|end|>x"])
def test_a_prompt_is_encoded_as_transformers_encodes_it(shared_bundle, text):
    codec = TextCodec(shared_bundle / "tokenizer.json")
    assert (
        codec.encode(text)
        == pytest.importorskip("transformers").AutoTokenizer.from_pretrained(shared_bundle)(text).input_ids
    )


def test_a_prompt_is_taken_whole_whatever_the_tokenizers_file_says(tokenizer, tmp_path):
    limited = type(tokenizer).from_str(tokenizer.to_str())
    limited.enable_truncation(3)
    limited.enable_padding(length=64)
    limited.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox jumps"
    assert TextCodec(tmp_path / "tokenizer.json").encode(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize("text", ["a\ud800", "\udcff"])
def test_text_that_is_no_unicode_is_refused(shared_bundle, text):
    with pytest.raises(RequestError, match=r"prompt: expected Unicode text, found '\\ud.*' at [01]$"):
        TextCodec(shared_bundle / "tokenizer.json").encode(text)


@pytest.mark.parametrize("content", [b"", b"{}", b"text", b"\xff", b'{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=f"^{path}: expected a tokenizer, found a file that is none: "):
        TextCodec(path)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected a tokenizer"):
        TextCodec(tmp_path / "tokenizer.json")
