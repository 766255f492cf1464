"""The certificate: what agrees is certified with what it was compared with, what does not is caught."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers

import prefix_runtime
from prefix_export import parity
from prefix_export.errors import ParityError, PrefixExportError
from prefix_export.models import load_base_model
from prefix_export.parity import CacheReference, Expectation, PrefixSource, compare, observe
from prefix_runtime import LayerPrefix
from tests.export.conftest import read_prefix

PROMPT = np.random.default_rng(1).integers(1, 384, size=20).tolist()


@pytest.fixture(scope="module")
def model_folder(workshop):
    return workshop.model("gpt2", tokenizer=True)


@pytest.fixture(scope="module")
def base(model_folder):
    return load_base_model(str(model_folder))


@pytest.fixture(scope="module")
def adapter(workshop, model_folder):
    return workshop.adapter(model_folder, 3)


@pytest.fixture(scope="module")
def prefix(adapter, base):
    return read_prefix(adapter, base.shape)


@pytest.fixture
def engine(shared_bundle):
    return prefix_runtime.load(shared_bundle, threads=1)


def certified(base, engine, task, prefix=None, path=None):
    source = PrefixSource(path) if path else None
    return compare(observe(base, prefix, source, max_length=320), engine, task)


def nudged(prefix):
    key = np.array(prefix.sites["decoder"][1].key)
    key[2, 1, :] += 0.01
    return with_layer(prefix, 1, LayerPrefix(key, prefix.sites["decoder"][1].value))


def swapped(prefix):
    layer = prefix.sites["decoder"][2]
    return with_layer(prefix, 2, LayerPrefix(layer.value, layer.key))


def with_layer(prefix, index, layer):
    layers = list(prefix.sites["decoder"])
    layers[index] = layer
    return replace(prefix, sites={"decoder": tuple(layers)})


@pytest.mark.parametrize(
    "spoil",
    [lambda prefix: replace(prefix, position_base=0), nudged, swapped],
    ids=["position base", "one key of one head by 0.01", "key and value swapped"],
)
def test_a_wrong_prefix_is_caught(base, engine, adapter, prefix, spoil):
    engine.add_task("wrong", spoil(prefix))
    with pytest.raises(ParityError) as caught:
        certified(base, engine, "wrong", prefix, adapter)
    message = str(caught.value)
    assert message.startswith("task 'wrong': expected the exported graph to agree with peft ")
    assert "within 1.0e-04" in message
    assert "found logits " in message


def test_a_wrong_base_model_is_caught(workshop, engine):
    other = load_base_model(str(workshop.model("gpt2", seed=1)))
    with pytest.raises(ParityError, match=r"^the bare model: .* different tokens$"):
        certified(other, engine, None)


def test_the_right_prefix_is_certified_against_peft_and_transformers(base, engine, adapter, prefix, tmp_path):
    engine.add_task("mine", prefix)
    prefix.save(tmp_path / "mine.safetensors")
    results = {
        None: certified(base, engine, None),
        "p3": certified(base, engine, "p3", prefix, adapter),
        "mine": certified(base, engine, "mine", prefix, tmp_path / "mine.safetensors"),
    }
    framework = f"transformers {transformers.__version__}"
    assert {task: result.reference for task, result in results.items()} == {
        None: framework,
        "p3": f"peft {peft.__version__}",
        "mine": framework,
    }
    for result in results.values():
        assert result.agrees
        assert 0 < result.largest_logit_difference <= result.tolerance == 1e-4
        assert result.prompts == 3


@pytest.mark.parametrize(("max_length", "prompts"), [(5, 1), (9, 2), (11, 2), (12, 3), (320, 3)])
def test_prompts_are_as_long_as_there_is_room_for_them_and_a_new_token(base, prefix, max_length, prompts):
    expectation = observe(base, prefix, None, max_length)
    assert len(expectation.prompts) == prompts
    assert len(expectation.prompts[-1]) == min(33, max_length - 3 - 1)
    for prompt, logits, tokens in zip(expectation.prompts, expectation.logits, expectation.tokens, strict=True):
        assert logits.shape == (len(prompt), 384)
        assert 1 <= len(tokens) <= min(12, max_length - 3 - len(prompt))


def test_the_certificate_is_in_the_manifest(shared_bundle):
    parity = json.loads((shared_bundle / "manifest.json").read_text())["parity"]
    assert parity["bare_model"]["reference"] == f"transformers {transformers.__version__}"
    assert set(parity["tasks"]) == {"p3", "p20"}
    for result in parity["tasks"].values():
        assert result["reference"] == f"peft {peft.__version__}"
        assert result["greedy_tokens_equal"] is True
        assert 0 < result["largest_logit_difference"] <= result["tolerance"] == 1e-4
        assert result["prompts"] == 3


def test_transformers_with_the_prefix_as_its_cache_is_pefts_model(base, adapter, prefix):
    ours = CacheReference(base.model, prefix)
    with parity._reference(base, prefix, PrefixSource(adapter)) as pefts:
        np.testing.assert_allclose(ours.logits(PROMPT), pefts.logits(PROMPT), rtol=0, atol=1e-5)
        assert ours.greedy(PROMPT, 12) == pefts.greedy(PROMPT, 12)


def test_transformers_without_a_prefix_is_the_model_itself(base):
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = base.model(input_ids=ids).logits[0].numpy()
        tokens = base.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    reference = CacheReference(base.model, None)
    np.testing.assert_allclose(reference.logits(PROMPT), logits, rtol=0, atol=1e-6)
    assert reference.greedy(PROMPT, 12) == tokens[0, len(PROMPT) :].tolist()


def test_the_models_own_generation_defaults_neither_disturb_the_comparison_nor_change(base, engine, adapter, prefix):
    defaults = transformers.GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, suppress_tokens=list(range(2, 384)), eos_token_id=0
    )
    before, base.model.generation_config = base.model.generation_config, defaults
    try:
        certified(base, engine, "p3", prefix, adapter)
        assert base.model.generation_config is defaults
    finally:
        base.model.generation_config = before


def test_without_peft_the_error_names_the_extra(base, adapter, prefix, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PrefixExportError, match=r"not installed; pip install 'prefix-export\[peft\]'.*--no-verify"):
        observe(base, prefix, PrefixSource(adapter), max_length=320)


def test_peft_is_not_needed_for_prefix_files(base, engine, prefix, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    prefix.save(tmp_path / "mine.safetensors")
    assert certified(base, engine, "p3", prefix, tmp_path / "mine.safetensors").agrees


@dataclass
class Scripted:
    """An engine that answers with what it is given."""

    row: list[float]
    tokens: list[int]
    together: list[int] | None = None  # where they differ in a batch
    bundle = SimpleNamespace(manifest=SimpleNamespace(cache="fp32", precision="fp32", target="cpu"))

    def logits(self, token_ids, task):
        assert task == "t"
        return np.tile(np.array(self.row, np.float32), (len(token_ids), 1))

    def generate(self, *, token_ids, task, max_new_tokens):
        assert task == "t"
        if (tuple(token_ids), max_new_tokens) == ((7,), 3):
            return SimpleNamespace(token_ids=tuple(self.tokens))
        assert (set(token_ids), set(max_new_tokens)) == ({(7,)}, {3})
        tokens = self.tokens if self.together is None else self.together
        return [SimpleNamespace(token_ids=tuple(tokens)) for _ in token_ids]


def compared(row, tokens, expected_row=None):
    """The comparison of what is expected, tokens 0, 1, 2, with what an engine answers."""
    logits = np.array([row if expected_row is None else expected_row], np.float32)
    return compare(Expectation("script", ((7,),), (logits,), ((0, 1, 2),)), Scripted(row, tokens), "t")


@pytest.mark.parametrize(
    ("row", "tokens"),
    [
        ([1.0, 0.9998, 0.0], [0, 1, 2]),
        ([1.0, 0.9999, 0.0], [0, 0, 2]),  # 1e-4 apart, twice the tolerance is accepted
        ([1.0, 1.0, 0.0], [1, 0, 0]),  # after a tie the rest is another text
    ],
    ids=["the same", "a tie", "another text behind a tie"],
)
def test_tokens_that_are_equal_or_tied_agree(row, tokens):
    assert compared(row, tokens).agrees


@pytest.mark.parametrize(
    ("row", "tokens"),
    [
        ([1.0, 0.9997, 0.0], [0, 0, 2]),
        ([1.0, 0.9999, 0.0], [0, 2, 2]),
        ([1.0, 0.9999, 0.0], [0, 1]),
        ([1.0, 0.9999, 0.0], [0, 1, 2, 2]),
        ([1.0, float("nan"), 0.0], [0, 2, 2]),
    ],
    ids=["no tie", "another token", "fewer", "more", "no number"],
)
def test_other_tokens_do_not_agree(row, tokens):
    with pytest.raises(ParityError, match=r"^task 't': expected .* agree with script within .*, different tokens$"):
        compared(row, tokens, expected_row=[1.0, 0.9999, 0.0])


@pytest.mark.parametrize(("largest", "difference"), [(1, 0.9e-4), (1000, 0.9e-2)])
def test_the_tolerance_grows_with_the_largest_logit(largest, difference):
    result = compared([largest, difference, 0.0], [0, 1, 2], expected_row=[largest, 0.0, 0.0])
    assert result.largest_logit_difference == pytest.approx(difference, rel=1e-3)
    assert result.tolerance == pytest.approx(max(1e-4, 1e-5 * largest))


@pytest.mark.parametrize(("largest", "difference"), [(1, 1.2e-4), (1000, 1.2e-2)])
def test_a_difference_beyond_the_tolerance_is_refused_with_both_numbers(largest, difference):
    message = rf"within {max(1e-4, 1e-5 * largest):.1e} .* found logits {difference:.1e} apart, equal tokens"
    with pytest.raises(ParityError, match=message):
        compared([largest, difference, 0.0], [0, 1, 2], expected_row=[largest, 0.0, 0.0])


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("side", ["reference", "graph", "both"])
def test_logits_that_are_not_numbers_never_agree(side, place):
    sound, broken = [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]
    broken[place] = float("nan")
    rows = {"reference": (sound, broken), "graph": (broken, sound), "both": (broken, broken)}[side]
    with pytest.raises(ParityError, match="nan apart, equal tokens"):
        compared(rows[0], [0, 1, 2], expected_row=rows[1])


def test_logits_that_are_not_numbers_never_agree_on_a_later_prompt_either():
    logits = [np.array([[1.0, 0.0, 0.0]], np.float32), np.array([[1.0, np.nan, 0.0]], np.float32)]
    expectation = Expectation("script", ((7,), (7,)), tuple(logits), ((0, 1, 2),) * 2)
    with pytest.raises(ParityError, match="nan apart"):
        compare(expectation, Scripted([1.0, 0.0, 0.0], [0, 1, 2]), "t")


def test_tokens_that_differ_in_a_batch_alone_are_refused():
    row = [3.0, 2.0, 1.0]
    expected = Expectation("script", ((7,),), (np.array([row], np.float32),), ((0, 1, 2),))
    with pytest.raises(ParityError, match="different tokens"):
        compare(expected, Scripted(row, [0, 1, 2], together=[0, 2, 2]), "t")
