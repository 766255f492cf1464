"""What `build` says of a model's generation defaults, what it refuses, and what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig

import prefix_runtime
from prefix_export.build import BuildRequest, build, writing
from prefix_export.errors import ModelError
from prefix_export.models import generation_defaults, load_base_model
from prefix_export.models.generation_defaults import (
    check_generation_config,
    followed_config,
    generation_report,
    logits_processors,
)
from prefix_runtime.generation.generation_config import FOLLOWED

VOCAB_SIZE = 384
PROMPT = torch.tensor([[5, 6, 7, 260, 12]])


@pytest.fixture(scope="module")
def base(workshop):
    return load_base_model(str(workshop.model(tokenizer=True)))


@pytest.fixture
def with_defaults(base):
    """The model with these generation defaults, for a while."""
    before = base.model.generation_config

    def change(**settings):
        base.model.generation_config = GenerationConfig(**settings)
        return base

    yield change
    base.model.generation_config = before


@pytest.fixture
def folder(workshop, tmp_path):
    """A model's folder, to be changed."""
    return shutil.copytree(workshop.model(tokenizer=True), tmp_path / "base")


def rewritten(folder, name="generation_config.json", **settings):
    content = json.loads((folder / name).read_text()) | settings
    (folder / name).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "not_followed"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.2, "suppress_tokens": [3]}, {}),
        ({"num_beams": 1, "guidance_scale": 1.0, "num_return_sequences": 1, "penalty_alpha": 0.0}, {}),
        ({"use_cache": False, "pad_token_id": 0, "cache_implementation": "static", "max_cache_len": 100}, {}),
        ({"prompt_lookup_num_tokens": 3, "assistant_confidence_threshold": 0.2}, {}),
        ({"chat_format": "chatml"}, {}),
        ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "num_return_sequences": 2}, {}),
        ({"num_beams": 4, "penalty_alpha": 0.6}, {}),
        ({"num_beams": 4, "do_sample": True}, {"num_beams": 4}),
        ({"guidance_scale": 1.5}, {"guidance_scale": 1.5}),
        ({"penalty_alpha": 0.6, "top_k": 4}, {"penalty_alpha": 0.6}),
        ({"penalty_alpha": 0.6, "do_sample": True}, {}),
        ({"max_time": 3.0, "token_healing": True}, {"max_time": 3.0, "token_healing": True}),
        ({"do_sample": True, "num_return_sequences": 3}, {"num_return_sequences": 3}),
        ({"dola_layers": "low"}, {"dola_layers": "low"}),
        ({"force_words_ids": [[3]]}, {"force_words_ids": [[3]]}),
    ],
    ids=str,
)
def test_what_the_runtime_does_not_follow_is_named(with_defaults, settings, not_followed):
    report = generation_report(with_defaults(eos_token_id=0, **settings))
    assert report.not_followed == not_followed
    assert report.record() == {"followed": list(report.followed), "not_followed": not_followed}
    for name, value in not_followed.items():
        assert any("the runtime does not follow " in line and f"{name} {value}" in line for line in report.warnings)
    if not not_followed:
        assert not [line for line in report.warnings if "does not follow" in line]


def test_a_watermark_is_named(with_defaults):
    report = generation_report(with_defaults(eos_token_id=0, watermarking_config={"bias": 2.5}))
    assert report.not_followed["watermarking_config"]["bias"] == 2.5


def test_a_setting_that_transformers_learns_later_is_named(with_defaults, monkeypatch):
    class Later(GenerationConfig):
        def __init__(self, **settings):
            self.top_n_sigma = settings.pop("top_n_sigma", None)
            super().__init__(**settings)

    monkeypatch.setattr(generation_defaults, "GenerationConfig", Later)
    assert generation_report(with_defaults(eos_token_id=0, top_n_sigma=2.0)).not_followed == {"top_n_sigma": 2.0}


def test_every_setting_of_transformers_is_followed_inert_or_named():
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    named = {"guidance_scale", "penalty_alpha", "token_healing", "max_time",
             "watermarking_config", "dola_layers", "constraints", "force_words_ids"}  # fmt: skip
    assert known == set(FOLLOWED) | generation_defaults._INERT | named
    assert not set(FOLLOWED) & generation_defaults._INERT


def test_the_documentation_has_a_row_for_every_setting():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "generation.md").read_text(encoding="utf-8")
    followed, not_followed = page.split("## What is followed")[1].split("## What is not followed")
    assert {name for name in FOLLOWED if f"`{name}`" not in followed} == set()
    named = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {
        *FOLLOWED,
        *generation_defaults._INERT,
    }
    assert {name for name in named if f"`{name}`" not in not_followed.split("##")[0]} == set()


def test_what_is_followed_is_listed(with_defaults):
    report = generation_report(with_defaults(eos_token_id=0, suppress_tokens=[3], max_time=2.0, pad_token_id=0))
    assert report.followed == ("eos_token_id", "suppress_tokens")


def test_stop_strings_want_a_tokenizer(with_defaults):
    base = with_defaults(eos_token_id=0, stop_strings=["."])
    assert generation_report(base).not_followed == {}
    assert generation_report(replace(base, tokenizer=None)).not_followed == {"stop_strings": ["."]}


def test_a_model_that_samples_is_told(with_defaults):
    (line,) = generation_report(with_defaults(eos_token_id=0, do_sample=True, temperature=0.6, top_p=0.9)).warnings
    assert "generation_config.json: the model samples by default (temperature 0.6, top_k 50, top_p 0.9)" in line
    assert line.endswith("for greedy text pass sampling=Sampling() or --temperature 0")


class TestEndTokens:
    def test_those_that_agree_are_not_mentioned(self, with_defaults):
        assert generation_report(with_defaults(eos_token_id=[7, 0])).warnings == ()

    def test_a_tokenizer_that_ends_otherwise_is_told(self, with_defaults):
        (line,) = generation_report(with_defaults(eos_token_id=70)).warnings
        shown = with_defaults().tokenizer.convert_ids_to_tokens(70)
        assert (
            f"the tokenizer's end token is '<|end|>' (0), but generation_config.json ends text at {shown!r} (70)"
            in line
        )
        assert "pass end_tokens=0 (--end-token '<|end|>')" in line

    def test_none_beside_one_in_the_models_configuration_is_told(self, with_defaults):
        (line,) = generation_report(with_defaults()).warnings
        assert "generation_config.json names no end token, though config.json names 0: text goes on" in line
        assert "pass end_tokens=0 (--end-token)" in line

    def test_one_beyond_the_vocabulary_is_told(self, with_defaults):
        lines = generation_report(with_defaults(eos_token_id=[0, 5000])).warnings
        assert [line for line in lines if "end token 5000 is beyond the vocabulary of 384: it never comes" in line]

    def test_a_model_without_a_tokenizer_is_left_alone(self, with_defaults):
        assert generation_report(replace(with_defaults(eos_token_id=7), tokenizer=None)).warnings == ()


REFUSED = [
    ({"suppress_tokens": "5"}, "suppress_tokens: expected a token id or a list of them, found '5'"),
    ({"min_length": 9, "max_length": 3}, "min_length: expected at most max_length, 3, found 9"),
    ({"do_sample": True, "temperature": 0.0}, "temperature: expected above 0 with do_sample, found 0"),
    ({"max_new_tokens": "12"}, "max_new_tokens: expected a whole number, 1 or more, found '12'"),
    ({"pad_token_id": "a"}, "expected defaults that transformers' generate takes, but it refuses them: '<' not"),
    ({"early_stopping": []}, 'early_stopping: expected true, false or "never", found []'),
    ({"num_beams": 2, "num_return_sequences": 3}, "expected defaults that transformers' generate takes, but it"),
    ({"num_return_sequences": 3}, "expected defaults that transformers' generate takes, but it refuses them: G"),
    ({"cache_implementation": "no"}, "expected defaults that transformers' generate takes, but it refuses"),
    ({"suppress_tokens": [3], "forced_eos_token_id": 3}, "forced_eos_token_id: expected a token that is not among"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_defaults_that_cannot_be_are_refused_before_weights_load(folder, settings, message):
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError) as error:
        load_base_model(rewritten(folder, **settings))
    assert str(error.value).startswith(f"model '{folder}': generation_config.json: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 10**5])
def test_a_generation_config_that_is_none_is_refused(folder, content):
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"generation_config\.json: expected a JSON object, found"):
        load_base_model(str(folder))


def test_a_model_without_the_file_and_a_file_of_weights_are_left_alone(folder):
    (folder / "generation_config.json").unlink()
    check_generation_config(str(folder), None, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"repetition_penalty": 2}, "`penalty` has to be a strictly positive float, but is 2"),
        ({"do_sample": True, "temperature": 2}, "`temperature` (=2) has to be a strictly positive float"),
        ({"do_sample": True, "typical_p": 0.0}, "`typical_p` has to be a float > 0 and < 1, but is 0.0"),
    ],
    ids=str,
)
def test_what_transformers_refuses_when_it_generates_build_refuses(with_defaults, settings, reason):
    base = with_defaults(eos_token_id=0, **settings)
    with pytest.raises(ValueError, match="has to be"):
        base.model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=2)
    with pytest.raises(ModelError) as error:
        generation_report(base)
    assert "generation_config.json: expected defaults that transformers' generate takes, but" in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "suppress_tokens": [3], "forced_eos_token_id": 9},
        {"eos_token_id": [3, 70], "min_new_tokens": 4, "exponential_decay_length_penalty": [2, 1.5]},
        {"eos_token_id": 70, "min_length": 9, "begin_suppress_tokens": [5, 6, 7, 200]},
        {"do_sample": True, "temperature": 0.7, "repetition_penalty": 2.5, "num_beams": 3, "max_new_tokens": 3},
    ],
    ids=str,
)
def test_transformers_processors_on_a_loop_of_ones_own_are_those_of_its_generate(with_defaults, settings):
    base = with_defaults(pad_token_id=0, **settings)
    config = followed_config(base.model)
    ids = PROMPT
    processors = logits_processors(base.model, config, PROMPT, 8)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    while ids.shape[1] < PROMPT.shape[1] + 8 and (ids is PROMPT or int(ids[0, -1]) not in ends):
        with torch.no_grad():
            scores = processors(ids, base.model(ids).logits[:, -1])
        ids = torch.cat([ids, scores.argmax(-1)[None]], 1)
    expected = base.model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, do_sample=False, num_beams=1
    )
    assert ids.tolist() == expected.tolist()


@pytest.fixture
def built(monkeypatch, workshop):
    """Builds of a model's folder that take the graph of another build, and compare nothing."""
    graph = workshop.bundle()

    def export(_base, plan, _prefixes, to, **_):
        for name in (plan.graph, f"{plan.graph}.data"):
            shutil.copy(graph / name, to / name)
        return 1

    monkeypatch.setattr(writing, "export_plan", export)

    def run(folder):
        adapter = workshop.adapter(workshop.model(tokenizer=True), 3)
        result = build(BuildRequest(str(folder), {"p3": adapter}, folder.parent / "out", verify=False))
        return SimpleNamespace(root=result.bundle.root, warnings=result.warnings, manifest=result.bundle.manifest)

    return run


def test_a_bundle_records_and_keeps_the_defaults(built, folder):
    rewritten(folder, suppress_tokens=[3, 4], num_beams=4, max_time=4.0, eos_token_id=70)
    found = built(folder)
    assert found.manifest.generation == {
        "followed": ["eos_token_id", "num_beams", "suppress_tokens"],
        "not_followed": {"max_time": 4.0},
    }
    assert len([line for line in found.warnings if "max_time 4.0" in line or "'<|end|>' (0)" in line]) == 2
    defaults = prefix_runtime.load(found.root, threads=1).generation_defaults()
    assert (defaults.suppress_tokens, defaults.end_tokens, defaults.num_beams) == ((3, 4), (70,), 4)


def test_a_bundle_without_end_tokens_goes_on_as_generate_does(built, folder):
    (folder / "generation_config.json").write_text("{}")
    found = built(folder)
    assert json.loads((found.root / "config.json").read_text())["eos_token_id"] == 0
    assert prefix_runtime.load(found.root, threads=1).generation_defaults().end_tokens == ()
    assert [line for line in found.warnings if "names no end token, though config.json names 0" in line]


def test_without_a_generation_config_end_tokens_and_defaults_are_those_of_the_models_configuration(built, folder):
    (folder / "generation_config.json").unlink()
    rewritten(folder, "config.json", eos_token_id=[70, 0], repetition_penalty=1.3)
    assert load_base_model(str(folder)).model.generation_config.repetition_penalty == 1.3
    found = built(folder)
    defaults = prefix_runtime.load(found.root, threads=1).generation_defaults()
    assert (defaults.end_tokens, defaults.repetition_penalty) == ((70, 0), 1.3)


@pytest.mark.parametrize("settings", [{"temperature": 0.9, "top_p": 0.6}, {"output_scores": True}])
def test_published_defaults_that_contradict_a_little_are_kept(built, folder, settings):
    # transformers warns of them, and refuses to save them once they were changed.
    rewritten(folder, **settings)
    assert prefix_runtime.load(built(folder).root, threads=1).generation_defaults().sampling.is_greedy


def test_a_refusal_leaves_nothing_behind(built, folder):
    rewritten(folder, repetition_penalty=2)
    with pytest.raises(ModelError, match="strictly positive float"):
        built(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["base"]


def test_the_end_token_of_a_tokenizer_can_be_asked_for_by_its_name(built, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|im_end|>", special=True)})
    tokenizer.save_pretrained(folder)
    rewritten(folder, eos_token_id=0)
    found = built(folder)
    end = tokenizer.eos_token_id
    assert [line for line in found.warnings if f"'<|im_end|>' ({end})" in line and "--end-token '<|im_end|>'" in line]
    assert prefix_runtime.load(found.root, threads=1).token_id("<|im_end|>") == end
