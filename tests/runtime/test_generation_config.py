"""What a bundle's generation_config.json may say, and what is refused when the bundle opens."""

from __future__ import annotations

import json
import re

import pytest

import prefix_runtime
from prefix_runtime import Bundle, BundleError, GenerationConfig, GenerationDefaults, RequestError, Sampling
from prefix_runtime.generation.generation_config import FOLLOWED, PLAIN, shown_defaults


def their_class():
    """transformers' own class of generation settings."""
    return pytest.importorskip("transformers").GenerationConfig


VOCAB_SIZE = 384
NOT_A_NUMBER = float("nan")

REFUSED = [
    ({"suppress_tokens": "5"}, "suppress_tokens: expected a token id or a list of them, found '5'"),
    ({"suppress_tokens": [[5]]}, "suppress_tokens: expected a token id or a list of them, found [[5]]"),
    ({"suppress_tokens": [-1]}, "suppress_tokens: expected a token id or a list of them, found [-1]"),
    ({"suppress_tokens": [True]}, "suppress_tokens: expected a token id or a list of them, found [True]"),
    ({"suppress_tokens": list(range(384))}, "suppress_tokens: expected to leave a token of 384, found all of them"),
    ({"suppress_tokens": ["a"] * 10**5}, "suppress_tokens: expected a token id or a list of them, found ['a', 'a'"),
    ({"begin_suppress_tokens": {"5": 1}}, "begin_suppress_tokens: expected a token id or a list of them, found {'5'"),
    ({"eos_token_id": -1}, "eos_token_id: expected a token id or a list of them, found -1"),
    ({"repetition_penalty": "1.5"}, "repetition_penalty: expected a number, 0.001 to 1000, found '1.5'"),
    ({"repetition_penalty": 0}, "repetition_penalty: expected a number, 0.001 to 1000, found 0"),
    ({"repetition_penalty": NOT_A_NUMBER}, "repetition_penalty: expected a number, 0.001 to 1000, found nan"),
    ({"encoder_repetition_penalty": -2}, "encoder_repetition_penalty: expected a number, 0.001 to 1000, found -2"),
    ({"no_repeat_ngram_size": 2.0}, "no_repeat_ngram_size: expected a whole number, 0 or more, found 2.0"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: expected a whole number, 0 or more, found -1"),
    ({"bad_words_ids": [5]}, "bad_words_ids: expected a list of lists of token ids up to 383, found [5]"),
    ({"bad_words_ids": [[]]}, "bad_words_ids: expected a list of lists of token ids up to 383, found [[]]"),
    ({"bad_words_ids": [[384]]}, "bad_words_ids: expected a list of lists of token ids up to 383, found [[384]]"),
    ({"sequence_bias": {"(5,)": 1.0}}, "sequence_bias: expected a list of pairs of token ids up to 383 and a number"),
    ({"sequence_bias": [[[5], NOT_A_NUMBER]]}, "sequence_bias: expected a list of pairs"),
    ({"sequence_bias": [[[5], float("inf")]]}, "sequence_bias: expected a list of pairs"),
    ({"sequence_bias": [[[5]]]}, "sequence_bias: expected a list of pairs"),
    ({"forced_bos_token_id": 384}, "forced_bos_token_id: expected a whole number, 0 to 383, found 384"),
    ({"forced_eos_token_id": [5, 384]}, "forced_eos_token_id: expected a token id or a list of them up to 383, found"),
    ({"min_length": "3"}, "min_length: expected a whole number, 0 or more, found '3'"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number, 1 or more, found 0"),
    ({"max_length": 10, "min_length": 11}, "min_length: expected at most max_length, 10, found 11"),
    ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens: expected at most max_new_tokens, 3, found 4"),
    ({"exponential_decay_length_penalty": 1.5}, "exponential_decay_length_penalty: expected a number of tokens and"),
    ({"exponential_decay_length_penalty": [3]}, "exponential_decay_length_penalty: expected a number of tokens and"),
    (
        {"exponential_decay_length_penalty": [3, -1.5], "eos_token_id": 3},
        "exponential_decay_length_penalty: expected a number of tokens and a factor above 0, as [20, 1.5], found",
    ),
    (
        {"exponential_decay_length_penalty": [3, 1.5], "eos_token_id": None},
        "exponential_decay_length_penalty: expected an end token to favour, found no eos_token_id",
    ),
    (
        {"forced_eos_token_id": 3, "suppress_tokens": [3]},
        "forced_eos_token_id: expected a token that is not among suppress_tokens, found 3",
    ),
    (
        {"forced_bos_token_id": 3, "suppress_tokens": [2, 3]},
        "forced_bos_token_id: expected a token that is not among suppress_tokens, found 3",
    ),
    ({"remove_invalid_values": 1}, "remove_invalid_values: expected true or false, found 1"),
    ({"renormalize_logits": "yes"}, "renormalize_logits: expected true or false, found 'yes'"),
    ({"do_sample": "yes"}, "do_sample: expected true or false, found 'yes'"),
    ({"do_sample": True, "temperature": 0.0}, "temperature: expected above 0 with do_sample, found 0; for greedy text"),
    ({"do_sample": True, "temperature": -1.0}, "temperature: expected a number, 0 or more, found -1.0"),
    ({"do_sample": True, "temperature": NOT_A_NUMBER}, "temperature: expected a number, 0 or more, found nan"),
    ({"do_sample": True, "top_k": -1}, "top_k: expected a whole number, 0 or more, found -1"),
    ({"do_sample": True, "top_p": "0.9"}, "top_p: expected a number, 0 or more, found '0.9'"),
    ({"do_sample": True, "min_p": 2}, "min_p: expected a number, 0 to 1, found 2"),
    ({"stop_strings": [""]}, "stop_strings: expected strings of at least one character, found ['']"),
    ({"stop_strings": 3}, "stop_strings: expected strings of at least one character, found 3"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_defaults_that_make_no_sense_are_refused_when_the_bundle_opens(bundle, rewrite, config, message):
    rewrite(bundle, "generation_config.json", json.dumps({"eos_token_id": 0, **config}).encode())
    with pytest.raises(BundleError, match=f"^{re.escape(f'{bundle}/generation_config.json: {message}')}") as error:
        prefix_runtime.load(bundle)
    assert len(str(error.value).removeprefix(str(bundle))) < 250
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"[" * 10**5, "text that is none"),
        (b'{"min_length": ' + b"9" * 10**4 + b"}", "text that is none"),
        (b"[]", "list"),
        (b"null", "NoneType"),
    ],
    ids=["deep", "digits", "list", "null"],
)
def test_a_file_that_is_no_object_is_refused(bundle, rewrite, content, found):
    rewrite(bundle, "generation_config.json", content)
    with pytest.raises(BundleError, match=rf"generation_config\.json: expected a JSON object, found {found}"):
        prefix_runtime.load(bundle)


def test_a_file_that_is_too_large_is_refused(bundle, rewrite, monkeypatch):
    monkeypatch.setattr("prefix_runtime.generation.generation_config._MOST_BYTES", 100)
    rewrite(bundle, "generation_config.json", b'{"suppress_tokens": [' + b"1, " * 100 + b"1]}")
    with pytest.raises(BundleError, match=r"generation_config\.json: expected at most 100 bytes, found 324"):
        prefix_runtime.load(bundle)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"eos_token_id": [5000], "suppress_tokens": [384], "begin_suppress_tokens": [10**12]},
        {"do_sample": False, "temperature": 0, "top_p": "hot", "min_p": 7},
        {"do_sample": None, "bad_words_ids": None, "min_length": None, "sequence_bias": None},
        {"do_sample": True, "temperature": 2, "top_p": 0, "top_k": 0, "epsilon_cutoff": 3.0, "eta_cutoff": -1.0},
        {"max_time": 4.0, "chat_format": "chatml", "max_window_size": 24000, "pad_token_id": -1},
        {"no_repeat_ngram_size": 10**9, "min_length": 10**15},
        {"sequence_bias": [[[5], float("-inf")]], "bad_words_ids": []},
        {"max_new_tokens": 3, "max_length": 2, "min_length": 2},
    ],
    ids=str,
)
def test_what_transformers_takes_or_leaves_aside_opens(bundle, rewrite, config):
    rewrite(bundle, "generation_config.json", json.dumps(config).encode())
    engine = prefix_runtime.load(bundle, threads=1)
    assert len(engine.generate(token_ids=[5, 6], max_new_tokens=2, sampling=Sampling()).token_ids) == 2


def test_without_a_generation_config_the_models_config_has_the_defaults(bundle, rewrite):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "generation_config.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    config = {
        "repetition_penalty": 1.5,
        "eos_token_id": None,
        "text_config": {"eos_token_id": [3], "min_length": 7, "repetition_penalty": 2.0},
    }
    rewrite(bundle, "config.json", json.dumps(config).encode())
    found = GenerationDefaults.of_bundle(Bundle.open(bundle))
    theirs = their_class().from_model_config(dict(config))
    assert found == GenerationDefaults(end_tokens=(3,), min_length=7, repetition_penalty=1.5)
    assert (theirs.eos_token_id, theirs.min_length, theirs.repetition_penalty) == ([3], 7, 1.5)


def test_every_name_is_one_of_transformers():
    assert set(FOLLOWED) <= set(vars(their_class()()))
    assert set(PLAIN) == set(GenerationConfig.__annotations__) - {"eos_token_id"}
    assert GenerationDefaults.of_config(PLAIN, VOCAB_SIZE) == GenerationDefaults()


def test_an_empty_sampling_configuration_is_that_of_transformers():
    theirs = their_class()._get_default_generation_params()
    sampling = GenerationDefaults.of_config({"do_sample": True}, VOCAB_SIZE).sampling
    assert sampling == Sampling(**{name: theirs[name] for name in ("temperature", "top_k", "top_p", "typical_p")})


@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_models_stop_strings_end_a_text(engine, bundle, rewrite, tokenizer):
    free = engine.generate("the lazy dog", max_new_tokens=30)
    stop = free.text[5:8]
    rewrite(bundle, "generation_config.json", json.dumps({"stop_strings": [stop]}).encode())
    if not tokenizer:
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "tokenizer.json"]
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        assert len(prefix_runtime.load(bundle).generate(token_ids=[5], max_new_tokens=3).token_ids) == 3
        return
    own = prefix_runtime.load(bundle, threads=1)
    assert own.generate("the lazy dog", max_new_tokens=30).text == free.text[: free.text.index(stop)]
    assert own.generate("the lazy dog", max_new_tokens=30, stop=[]).text == free.text
    assert own.generate("the lazy dog", max_new_tokens=30, stop=free.text[:2]).text == ""


def test_a_token_is_found_by_its_name(engine):
    assert engine.token_id("<|end|>") == 0
    with pytest.raises(
        RequestError, match=r"^token '<\|no\|>': expected one of the tokenizer's vocabulary, found none"
    ):
        engine.token_id("<|no|>")


def test_defaults_are_shown_as_people_read_them(bundle, rewrite):
    config = {"do_sample": True, "temperature": 0.6, "suppress_tokens": list(range(9)), "eos_token_id": [0, 7]}
    rewrite(bundle, "generation_config.json", json.dumps(config | {"max_new_tokens": 50}).encode())
    assert shown_defaults(Bundle.open(bundle)) == {
        "generation": "sampled, temperature 0.6, top_k 50, max_new_tokens 50, suppress_tokens 9 of them",
        "end tokens": "0, 7",
    }
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["generation"] = {"followed": [], "not_followed": {"max_time": 4.0, "constraints": ["x" * 500]}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    shown = shown_defaults(Bundle.open(bundle))["not followed"]
    assert shown.startswith("max_time 4.0, constraints ['xxx")
    assert len(shown) < 120


def test_a_manifest_of_an_older_version_opens(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["generation"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert shown_defaults(Bundle.open(bundle)) == {"generation": "greedy", "end tokens": "0"}


@pytest.mark.parametrize("generation", ["none", [], {}, {"followed": []}, {"followed": {}, "not_followed": {}}])
def test_a_manifest_whose_generation_is_none_is_refused(bundle, generation):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"generation": generation}))
    with pytest.raises(BundleError, match="generation: "):
        Bundle.open(bundle)
