"""The certificate: what agrees is certified with what it was compared with, what does not is caught."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import prefix_runtime
from prefix_export.build import BuildRequest, build
from prefix_export.errors import ExportError, ParityError, PrefixExportError
from prefix_export.models import load_base_model
from prefix_export.prefixes.reference import CacheReference, PrefixSource, reference
from prefix_export.tokenizers.held_out import HeldOut, Text
from prefix_export.verify import parity
from prefix_export.verify.parity import Expectation, PromptTruth, compare, measured, observe
from prefix_export.verify.yardstick import Arithmetic, RoundedCache, own_error, rounding_of
from prefix_runtime import LayerPrefix
from prefix_runtime.generation.generation_config import GenerationDefaults
from tests.export.conftest import read_prefix
from tests.workshop import with_families

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
    expected = observe(base, prefix, source, None, max_length=320)
    return compare(measured(expected, base, prefix, source, Arithmetic()), engine, task)


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
    assert "with double precision within 1.0e-04" in message
    assert " tokens" in message.partition(", found ")[2]


def test_a_wrong_base_model_is_caught(workshop, engine):
    other = load_base_model(str(workshop.model("gpt2", seed=1)))
    with pytest.raises(ParityError, match=r"^the bare model: .* and different tokens$"):
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
        assert 0 < result.error <= result.limit == 1e-4
        assert 0 < result.yardstick < 2.5e-5
        assert (result.prompts, result.text_prompts) == (3, 0)


@pytest.mark.parametrize(("max_length", "prompts"), [(5, 1), (9, 2), (11, 2), (12, 3), (320, 3)])
def test_prompts_are_as_long_as_there_is_room_for_them_and_a_new_token(base, prefix, max_length, prompts):
    found = observe(base, prefix, None, None, max_length=max_length).prompts
    assert len(found) == prompts
    assert len(found[-1].token_ids) == min(33, max_length - 3 - 1)
    for prompt in found:
        assert prompt.logits.shape == (len(prompt.token_ids), 384)
        assert prompt.logits.dtype == np.float64
        assert 1 <= len(prompt.tokens) <= prompt.new_tokens == min(12, max_length - 3 - len(prompt.token_ids))


def test_the_certificate_is_in_the_manifest(shared_bundle):
    parity = json.loads((shared_bundle / "manifest.json").read_text())["parity"]
    assert parity["bare_model"]["reference"] == f"transformers {transformers.__version__}"
    assert set(parity["tasks"]) == {"p3", "p20"}
    for result in parity["tasks"].values():
        assert result["reference"] == f"peft {peft.__version__}"
        assert result["greedy_tokens_equal"] is True
        assert 0 < result["error"] <= result["limit"] == 1e-4
        assert 0 < result["yardstick"] < 2.5e-5


def test_transformers_with_the_prefix_as_its_cache_is_pefts_model(base, adapter, prefix):
    ours = CacheReference(base.model, prefix)
    with reference(base, prefix, PrefixSource(adapter)) as pefts:
        np.testing.assert_allclose(ours.logits(PROMPT), pefts.logits(PROMPT), rtol=0, atol=1e-5)
        assert ours.greedy(PROMPT, 12) == pefts.greedy(PROMPT, 12)


def test_transformers_without_a_prefix_is_the_model_itself(base):
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = base.model(input_ids=ids).logits[0].numpy()
        tokens = base.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    ours = CacheReference(base.model, None)
    np.testing.assert_allclose(ours.logits(PROMPT), logits, rtol=0, atol=1e-6)
    assert ours.greedy(PROMPT, 12) == tokens[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("kind", with_families(["peft"], ["transformers"]))
def test_the_models_own_generation_defaults_are_compared(workshop, tmp_path, kind):
    """Tokens under rules that change them agree; the same bundle under other rules does not."""
    model = shutil.copytree(workshop.model("gpt2", tokenizer=True), tmp_path / "model")
    path = workshop.adapter(model, 3)
    prefix = read_prefix(path, load_base_model(str(model)).shape)
    prefix.save(tmp_path / "mine.safetensors")
    source = path if kind == "peft" else tmp_path / "mine.safetensors"
    defaults = {"suppress_tokens": list(range(2, 300)), "repetition_penalty": 3.0, "eos_token_id": 0}
    (model / "generation_config.json").write_text(json.dumps(defaults))
    built = build(BuildRequest(str(model), {"t": source}, tmp_path / "bundle"))
    assert built.parity["t"].greedy_tokens_equal
    base = load_base_model(str(model))
    base.model.generation_config.suppress_tokens = list(range(300, 384))
    with pytest.raises(ParityError, match="different tokens"):
        certified(base, prefix_runtime.load(built.bundle.root, threads=1), "t", prefix, source)


def test_without_peft_the_error_names_the_extra(base, adapter, prefix, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PrefixExportError, match=r"not installed; pip install 'prefix-export\[peft\]'.*--no-verify"):
        observe(base, prefix, PrefixSource(adapter), None, max_length=320)


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
    bundle = SimpleNamespace(manifest=SimpleNamespace(cache="fp32", geometry=SimpleNamespace(vocab_size=3)))

    def generation_defaults(self):
        return GenerationDefaults.of_config({}, 3)

    def logits(self, token_ids, task):
        assert task == "t"
        return np.tile(np.array(self.row, np.float32), (len(token_ids), 1))

    def generate(self, *, token_ids, task, max_new_tokens, sampling, num_beams):
        assert task == "t"
        assert (sampling, num_beams) == (prefix_runtime.Sampling(), 1)
        if (tuple(token_ids), max_new_tokens) == ((7,), 3):
            return SimpleNamespace(token_ids=tuple(self.tokens))
        assert (set(token_ids), set(max_new_tokens)) == ({(7,)}, {3})
        tokens = self.tokens if self.together is None else self.together
        return [SimpleNamespace(token_ids=tuple(tokens)) for _ in token_ids]


def expectation(*rows, yardstick=0.0):
    prompts = tuple(PromptTruth((7,), np.array([row]), (0, 1, 2), 3, yardstick) for row in rows)
    return Expectation("script", prompts)


def compared(row, tokens, expected_row=None, yardstick=0.0):
    """The comparison of what is expected, tokens 0, 1, 2, with what an engine answers."""
    return compare(expectation(row if expected_row is None else expected_row, yardstick=yardstick),
                   Scripted(row, tokens), "t")  # fmt: skip


@pytest.mark.parametrize(
    ("row", "tokens"),
    [
        ([1.0, 0.9998, 0.0], [0, 1, 2]),
        ([1.0, 0.9999, 0.0], [0, 0, 2]),  # 1e-4 apart, twice the limit is accepted
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
    with pytest.raises(ParityError, match=r"^task 't': expected .* agree with script .* and different tokens$"):
        compared(row, tokens, expected_row=[1.0, 0.9999, 0.0])


@pytest.mark.parametrize(("yardstick", "limit"), [(0.0, 1e-4), (2e-5, 1e-4), (1e-3, 4e-3)])
def test_the_limit_is_four_times_the_yardstick_or_the_floor(yardstick, limit):
    within, beyond = 0.9 * limit, 1.1 * limit
    result = compared([1.0, within, 0.0], [0, 1, 2], expected_row=[1.0, 0.0, 0.0], yardstick=yardstick)
    assert result.error == pytest.approx(within, rel=1e-3)
    assert (result.yardstick, result.limit) == (yardstick, pytest.approx(limit))
    message = f"within {limit:.1e} (script itself: {yardstick:.1e}), found {beyond:.1e}"
    with pytest.raises(ParityError, match=re.escape(message)):
        compared([1.0, beyond, 0.0], [0, 1, 2], expected_row=[1.0, 0.0, 0.0], yardstick=yardstick)


def test_the_largest_yardstick_of_all_prompts_counts():
    prompts = (*expectation([1.0, 0.0, 0.0], yardstick=1e-2).prompts, *expectation([1.0, 0.01, 0.0]).prompts)
    result = compare(Expectation("script", prompts), Scripted([1.0, 0.0, 0.0], [0, 1, 2]), "t")
    assert (result.error, result.yardstick, result.limit) == (pytest.approx(0.01), 1e-2, 4e-2)


def test_texts_and_random_tokens_have_a_yardstick_each():
    # The first prompt is a text that the framework itself gets right: what is accepted of random tokens is no excuse.
    text, random = (expectation([1.0, 0.0, 0.0], yardstick=yardstick).prompts for yardstick in (1e-5, 1e-2))
    both = Expectation("script", (*text, *random), text_prompts=1)
    assert [kind.limit for kind in both.by_kind()] == [1e-4, pytest.approx(4e-2)]
    with pytest.raises(ParityError, match=re.escape("within 1.0e-04 (script itself: 1.0e-05), found 1.0e-02")):
        compare(both, Scripted([1.0, 0.01, 0.0], [0, 1, 2]), "t")
    alone = compare(Expectation("script", random), Scripted([1.0, 0.01, 0.0], [0, 1, 2]), "t")
    assert alone.limit == pytest.approx(4e-2)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("side", ["reference", "graph", "both"])
def test_logits_that_are_not_numbers_never_agree(side, place):
    sound, broken = [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]
    broken[place] = float("nan")
    rows = {"reference": (sound, broken), "graph": (broken, sound), "both": (broken, broken)}[side]
    with pytest.raises(ParityError, match="found nan and equal tokens"):
        compared(rows[0], [0, 1, 2], expected_row=rows[1])


def test_logits_that_are_not_numbers_never_agree_on_a_later_prompt_either():
    with pytest.raises(ParityError, match="found nan"):
        compare(expectation([1.0, 0.0, 0.0], [1.0, np.nan, 0.0]), Scripted([1.0, 0.0, 0.0], [0, 1, 2]), "t")


def test_tokens_that_differ_in_a_batch_alone_are_refused():
    row = [3.0, 2.0, 1.0]
    with pytest.raises(ParityError, match="different tokens"):
        compare(expectation(row), Scripted(row, [0, 1, 2], together=[0, 2, 2]), "t")


def test_a_model_that_leaves_what_a_type_holds_is_refused(base, monkeypatch):
    monkeypatch.setattr(parity, "own_error", lambda *_: float("inf"))
    with pytest.raises(ParityError, match=r"in float16: expected finite logits.*take another --precision"):
        measured(observe(base, None, None, None, max_length=320), base, None, None, Arithmetic(torch.float16))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])
def test_a_double_precision_run_that_does_not_fit_in_memory_is_one_line(base, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(CacheReference, "logits", fail)
    with pytest.raises(
        ExportError, match=r"expected memory for the comparison in double precision, 0\.0 GB.*--no-verify"
    ):
        observe(base, None, None, None, max_length=320)


def test_the_largest_error_of_several_runs_is_the_yardstick(base, prefix):
    truth = observe(base, prefix, None, None, max_length=320).prompts[-1]
    reference = CacheReference(base.model, prefix)
    plain = np.abs(reference.logits(truth.token_ids) - truth.logits).max()
    own = own_error(reference, base.model, truth.token_ids, truth.logits, torch.float32)
    assert plain <= own < 20 * plain
    # Without noise left behind.
    assert np.abs(reference.logits(truth.token_ids) - truth.logits).max() == plain


SCALE = 0.02


@pytest.mark.parametrize("kept_in", [torch.float16, torch.bfloat16, torch.int8])
def test_the_truth_of_a_rounded_cache_is_rounded_too(base, prefix, kept_in):
    scales = [LayerPrefix(np.full((4, 1, 16), SCALE, np.float32), np.full((4, 1, 16), SCALE, np.float32))] * 3
    arithmetic = Arithmetic(cache=kept_in, scales=scales if kept_in == torch.int8 else None)
    plain = observe(base, prefix, None, None, max_length=320)
    rounded = measured(plain, base, prefix, None, arithmetic)
    changes = [np.abs(a.logits - b.logits).max() for a, b in zip(plain.prompts, rounded.prompts, strict=True)]
    assert min(changes) > 1e-6
    assert rounded.yardstick < max(changes)  # else it would hide that a cache is not rounded


def test_a_rounded_cache_keeps_what_its_type_holds():
    numbers = torch.linspace(-3, 3, 999)[None, None, :, None]
    half = RoundedCache(Arithmetic(cache=torch.float16))
    read, _ = half.update(numbers, numbers, 0)
    assert torch.equal(read, numbers)  # the new ones, as they are
    read, _ = half.update(numbers[:, :, :1], numbers[:, :, :1], 0)
    assert torch.equal(read[:, :, :-1], numbers.half().float())
    eighth = LayerPrefix(np.full((1, 1, 1), 1 / 64, np.float32), np.full((1, 1, 1), 1 / 64, np.float32))
    read, _ = RoundedCache(Arithmetic(cache=torch.int8, scales=[eighth])).update(numbers, numbers, 0)
    assert torch.equal(read, (numbers * 64).round().clamp(-127, 127) / 64)


def test_prompts_are_text_and_random_tokens(workshop):
    parity = json.loads((workshop.bundle() / "manifest.json").read_text())["parity"]
    assert {(result["prompts"], result["text_prompts"]) for result in parity["tasks"].values()} == {(5, 2)}


def test_prompts_of_equal_beginnings_count_once():
    texts = tuple(Text(ids, 1) for ids in (tuple(range(60)), (*range(50), 7, 7), (5, 6), (8,)))
    found = parity.text_prompts(HeldOut("x", texts, is_text=True), room=300)
    assert found == [tuple(range(48)), (5, 6)]


def test_noise_has_the_size_of_the_roundings_in_a_sum():
    unit = torch.finfo(torch.float32).eps / 2
    sums = {  # of so many products
        torch.nn.Linear(576, 3): 576,
        Conv1D(3, 576): 576,
        torch.nn.Embedding(576, 3): 16,
        torch.nn.LayerNorm(576): 16,
    }
    assert {layer: rounding_of(layer, torch.float32) for layer in sums} == {
        layer: pytest.approx(unit * (terms / 16) ** 0.5) for layer, terms in sums.items()
    }
    assert rounding_of(torch.nn.Linear(576, 3), torch.float16) == torch.finfo(torch.float16).eps / 2
