"""Folding against the frameworks that trained: PEFT's own models, and transformers for texts."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefix_runtime
from prefix_export.build import BuildRequest, build
from prefix_export.errors import CheckpointError, PrefixExportError
from prefix_export.models import load_base_model
from prefix_export.models.hub import split_revision
from prefix_export.models.model_shape import ModelShape
from prefix_export.prefixes.fold import fetch_checkpoint, fold, fold_for_bundle, fold_soft_prompt, fold_text
from prefix_export.prefixes.reference import CacheReference, PrefixSource, reference
from prefix_runtime import Bundle, Prefix, PrefixMismatchError

LENGTH = 6
KINDS = {
    "prompt tuning": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=LENGTH),
    "p-tuning, MLP": lambda task: PromptEncoderConfig(
        task_type=task, num_virtual_tokens=LENGTH, encoder_hidden_size=16
    ),
    "p-tuning, LSTM": lambda task: PromptEncoderConfig(
        task_type=task, num_virtual_tokens=LENGTH, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "multitask": lambda task: MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=LENGTH, num_tasks=2),
    "CPT": lambda task: CPTConfig(
        task_type=task, num_virtual_tokens=LENGTH, cpt_token_ids=[5, 6, 7, 8, 9, 10], cpt_mask=[1] * LENGTH,
        cpt_tokens_type_mask=[1, 2, 3, 1, 2, 3],
    ),
    "cartridge": lambda task: CartridgeConfig(task_type=task, num_virtual_tokens=LENGTH, num_frozen_tokens=2),
    "prefix tuning": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH),
    "prefix tuning, projected": lambda task: PrefixTuningConfig(
        task_type=task, num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=16
    ),
}  # fmt: skip


def save_adapter(model, config, folder):
    """An adapter that PEFT saves, of random numbers that tell right from wrong."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(folder)
    return folder


def prompt(base, length=9):
    return np.random.default_rng(1).integers(base.geometry.vocab_size, size=length).tolist()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def causal(request, workshop):
    return load_base_model(str(workshop.model(request.param, tokenizer=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_tokens_are_pefts(causal, workshop, tmp_path, kind):
    folder = workshop.root / causal.name
    adapter = save_adapter(AutoModelForCausalLM.from_pretrained(folder), KINDS[kind]("CAUSAL_LM"), tmp_path / "adapter")
    folded = fold(adapter, causal.shape, lambda: causal)
    assert len(folded.prefixes) == (2 if kind == "multitask" else 1)
    ids = prompt(causal)
    for part, prefix in folded.prefixes.items():
        assert (prefix.prefix_length, prefix.position_base) == (LENGTH, LENGTH)
        ours = CacheReference(causal.model, prefix)
        logits, tokens = ours.logits(ids), ours.greedy(ids, 20)
        with reference(causal, prefix, PrefixSource(adapter, part)) as peft:
            assert peft.name.startswith("peft")
            np.testing.assert_allclose(logits, peft.logits(ids), atol=1e-4)
            assert tokens == peft.greedy(ids, 20)


@pytest.mark.parametrize("kind", ["prefix tuning", "prefix tuning, projected", "cartridge"])
def test_keys_and_values_are_pefts(causal, workshop, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(workshop.root / causal.name)
    adapter = save_adapter(model, KINDS[kind]("CAUSAL_LM"), tmp_path / "adapter")
    (prefix,) = fold(adapter, causal.shape, lambda: causal).prefixes.values()
    plain = AutoModelForCausalLM.from_pretrained(workshop.root / causal.name)
    cache = PeftModel.from_pretrained(plain, adapter).get_prompt(1)
    for layer, expected in zip(prefix.sites["decoder"], cache.layers, strict=True):
        np.testing.assert_allclose(layer.key, expected.keys[0].detach().numpy(), atol=1e-6)
        np.testing.assert_allclose(layer.value, expected.values[0].detach().numpy(), atol=1e-6)


SEQ2SEQ = {
    "bart": (transformers.BartConfig, {"d_model": 64, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 32,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}),
    "bart, shallow decoder": (transformers.BartConfig, {"d_model": 64, "encoder_layers": 4, "decoder_layers": 2,
             "encoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}),
    "t5": (transformers.T5Config, {"d_model": 64, "num_layers": 3, "num_heads": 4, "d_kv": 16, "d_ff": 96}),
}  # fmt: skip


def seq2seq(name, folder):
    """A random encoder-decoder, saved."""
    config_class, sizes = SEQ2SEQ[name]
    torch.manual_seed(0)
    config = config_class(vocab_size=99, **sizes)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    model.save_pretrained(folder)
    return model, ModelShape.of_config(str(folder), config)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_encoder_decoders_map_is_pefts_own(tmp_path, name):
    model, shape = seq2seq(name, tmp_path / "model")
    adapter = save_adapter(model, KINDS["prefix tuning"]("SEQ_2_SEQ_LM"), tmp_path / "adapter")
    folded = fold(adapter, shape, pytest.fail)
    prefix = folded.prefixes[""]
    assert list(prefix.sites) == ["decoder"]
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    cache = PeftModel.from_pretrained(plain, adapter).get_prompt(1).self_attention_cache
    layers = prefix.sites["decoder"]
    assert len(cache.layers) >= len(layers)
    for layer, expected in zip(layers, cache.layers, strict=False):
        np.testing.assert_allclose(layer.key, expected.keys[0].detach().numpy(), atol=1e-6)
        np.testing.assert_allclose(layer.value, expected.values[0].detach().numpy(), atol=1e-6)
    # Of an odd number of layers every slot is read, in another order.
    assert any("trained slots, and so does this reader" in line for line in folded.warnings) == (name != "t5")


def test_a_decoder_deeper_than_its_encoder_is_refused_as_by_peft(tmp_path, monkeypatch):
    deep = (transformers.BartConfig, {**SEQ2SEQ["bart"][1], "encoder_layers": 1})
    monkeypatch.setitem(SEQ2SEQ, "deep", deep)
    model, shape = seq2seq("deep", tmp_path / "model")
    adapter = save_adapter(model, KINDS["prefix tuning"]("SEQ_2_SEQ_LM"), tmp_path / "adapter")
    with pytest.raises(PrefixMismatchError, match="expected slots for at least 4 layers"):
        fold(adapter, shape, pytest.fail)


@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning, MLP"])
def test_an_encoders_soft_prompt_stays_embeddings(tmp_path, kind):
    model, shape = seq2seq("t5", tmp_path / "model")
    adapter = save_adapter(model, KINDS[kind]("SEQ_2_SEQ_LM"), tmp_path / "adapter")
    folded = fold(adapter, shape, pytest.fail)
    prefix = folded.prefixes[""]
    assert not prefix.sites
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    expected = PeftModel.from_pretrained(plain, adapter).get_prompt(1)[0, :LENGTH]
    np.testing.assert_allclose(prefix.embeddings, expected.detach().numpy(), atol=1e-6)
    assert any("the last 6 rows" in line for line in folded.warnings)
    prefix.save(tmp_path / "prompt.safetensors")
    assert Prefix.load(tmp_path / "prompt.safetensors") == prefix


ENCODERS = {
    "bert": (transformers.BertConfig, "SEQ_CLS", transformers.AutoModelForSequenceClassification),
    "roberta": (transformers.RobertaConfig, "SEQ_CLS", transformers.AutoModelForSequenceClassification),
    "bert, tokens": (transformers.BertConfig, "TOKEN_CLS", transformers.AutoModelForTokenClassification),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_with_its_head(tmp_path, name):
    config_class, task, loader = ENCODERS[name]
    torch.manual_seed(0)
    config = config_class(vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                          intermediate_size=32, max_position_embeddings=64, num_labels=3)  # fmt: skip
    loader.from_config(config).save_pretrained(tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    model = loader.from_pretrained(tmp_path / "model")
    adapter = save_adapter(model, KINDS["prefix tuning"](task), tmp_path / "adapter")
    prefix = fold(adapter, ModelShape.of_config(str(tmp_path / "model"), config), pytest.fail).prefixes[""]
    assert list(prefix.sites) == ["encoder"]
    assert prefix.head
    wrapped = PeftModel.from_pretrained(loader.from_pretrained(tmp_path / "model"), adapter).eval()
    ids = torch.randint(5, 99, (1, 7))
    with torch.no_grad():
        expected = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    plain = loader.from_pretrained(tmp_path / "model").eval()
    state = plain.state_dict()
    state |= {key: torch.from_numpy(np.array(array)) for key, array in prefix.head.items()}
    plain.load_state_dict(state)  # the head's names are the base model's own
    cache = transformers.DynamicCache()
    for index, layer in enumerate(prefix.sites["encoder"]):
        cache.update(torch.tensor(layer.key)[None], torch.tensor(layer.value)[None], index)
    with torch.no_grad():
        found = plain(input_ids=ids, attention_mask=torch.ones(1, LENGTH + 7), past_key_values=cache).logits
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)


class TestText:
    def test_a_text_as_a_prefix_is_the_text_before_the_prompt(self, causal):
        text = "the quick brown fox"
        prefix = fold_text(text, causal)
        before, ids = causal.tokenizer(text)["input_ids"], prompt(causal)
        assert (prefix.prefix_length, prefix.position_base) == (len(before), len(before))
        ours, plain = CacheReference(causal.model, prefix), CacheReference(causal.model, None)
        np.testing.assert_allclose(ours.logits(ids), plain.logits([*before, *ids])[len(before) :], atol=1e-4)
        assert ours.greedy(ids, 20) == plain.greedy([*before, *ids], 20)
        assert prefix.source.format == "text"
        assert prefix.base_fingerprint == causal.fingerprint
        assert text not in json.dumps(dict(prefix.metadata))

    def test_a_prompt_behind_a_text_begins_without_special_tokens(self, workshop, tmp_path):
        model = tmp_path / "model"
        shutil.copytree(workshop.model("llama", tokenizer=True), model)
        begins = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.post_processor = begins
        tokenizer.save(str(model / "tokenizer.json"))
        base = load_base_model(str(model))
        fold_text("the quick", base).save(tmp_path / "text.safetensors")
        build(BuildRequest(str(model), {"text": tmp_path / "text.safetensors"}, tmp_path / "bundle", verify=False))
        engine = prefix_runtime.load(tmp_path / "bundle")
        found = engine.generate(" brown fox", task="text", max_new_tokens=12)
        assert found.token_ids == engine.generate("the quick brown fox", max_new_tokens=12).token_ids

    def test_tokens_that_end_a_text_are_left_out(self, workshop, causal):
        tokenizer = AutoTokenizer.from_pretrained(workshop.root / causal.name)
        end = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
        end.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|end|> $A <|end|>", special_tokens=[("<|end|>", 0)]
        )
        base = load_base_model(str(workshop.root / causal.name))
        object.__setattr__(base, "tokenizer", end)
        assert end("fox")["input_ids"][-1] == end("fox")["input_ids"][0] == 0
        assert fold_text("fox", base).prefix_length == len(end("fox")["input_ids"]) - 1

    def test_a_model_without_a_tokenizer_and_an_empty_text_are_refused(self, base, causal):
        with pytest.raises(PrefixExportError, match="expected a tokenizer to fold a text with"):
            fold_text("fox", base)
        with pytest.raises(PrefixExportError, match="text: expected at least one token"):
            fold_text("", causal)

    def test_a_text_longer_than_the_context_is_refused(self, causal):
        with pytest.raises(CheckpointError, match="leaves 2 of 320 positions"):
            fold_text("fox " * 400, causal)


class TestBundle:
    def test_soft_prompts_are_built_directly_and_compared_with_peft(self, workshop, tmp_path):
        model = workshop.model("gpt2", tokenizer=True)
        adapters = {}
        for kind in ("prompt tuning", "multitask"):
            adapters[kind.split()[0]] = save_adapter(
                AutoModelForCausalLM.from_pretrained(model), KINDS[kind]("CAUSAL_LM"), tmp_path / kind
            )
        result = build(BuildRequest(str(model), adapters, tmp_path / "bundle"))
        assert result.bundle.tasks == ("multitask-0", "multitask-1", "prompt")
        assert all(result.parity[task].reference.startswith("peft") for task in result.bundle.tasks)
        engine = prefix_runtime.load(tmp_path / "bundle")
        tokens = {engine.generate(token_ids=[5, 6, 7], task=task).token_ids for task in engine.tasks}
        assert len(tokens) == 3, "the prompts say the same: they would show nothing"

    def test_a_bundle_alone_cannot_fold_a_soft_prompt(self, workshop, shared_bundle, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(workshop.model("gpt2"))
        adapter = save_adapter(model, KINDS["prompt tuning"]("CAUSAL_LM"), tmp_path / "adapter")
        with pytest.raises(CheckpointError, match="only the model can turn into them; fold it first"):
            fold_for_bundle(adapter, Bundle.open(shared_bundle))
        multitask = save_adapter(
            AutoModelForCausalLM.from_pretrained(workshop.model("gpt2")),
            KINDS["multitask"]("CAUSAL_LM"),
            tmp_path / "m",
        )
        with pytest.raises(CheckpointError, match="prefix-export fold"):
            fold_for_bundle(multitask, Bundle.open(shared_bundle))


def test_a_soft_prompt_as_long_as_the_context_is_refused(base):
    with pytest.raises(CheckpointError, match="leaves 2 of 320 positions, found one of 320"):
        fold_soft_prompt(np.zeros((320, 64), np.float32), base)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_bigcode", "opt", "gpt_neox", "llama", "qwen2", "qwen3", "phi3",
                                          "mistral", "gemma", "stablelm", "granite"])  # fmt: skip
def test_a_configuration_tells_what_running_the_model_does(workshop, architecture):
    base = load_base_model(str(workshop.model(architecture)))
    told = ModelShape.of_config("model", base.model.config)
    assert told.sites["decoder"] == base.geometry.layers
    windows = [layer.sliding_window for layer in base.layers if layer.sliding_window]
    assert list(told.sliding_windows) == windows


def test_a_hub_id_is_fetched_once_and_read_offline(causal, workshop, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(workshop.root / causal.name)
    adapter = save_adapter(model, KINDS["prefix tuning"]("CAUSAL_LM"), tmp_path / "adapter")
    asked = []

    def download(name, revision, allow_patterns):
        assert revision is None
        asked.append((name, allow_patterns))
        return str(adapter)

    monkeypatch.setattr("prefix_export.prefixes.fold.snapshot_download", download)
    found = fold(Path("somebody/adapter"), causal.shape, pytest.fail).prefixes[""]
    assert found == fold(adapter, causal.shape, pytest.fail).prefixes[""]
    ((name, patterns),) = asked
    assert name == "somebody/adapter"
    assert {"*.json", "*.safetensors", "*.bin"} <= set(patterns)


@pytest.mark.parametrize(
    ("asked", "repository", "revision", "inside"),
    [
        ("somebody/adapter@v1.0", "somebody/adapter", "v1.0", ""),
        ("somebody/adapter@refs/pr/3", "somebody/adapter", "refs/pr/3", ""),
        ("somebody/adapter/support", "somebody/adapter", None, "support"),
        ("somebody/adapter/runs/checkpoint-9@main", "somebody/adapter", "main", "runs/checkpoint-9"),
        ("somebody/adapter/runs/own.npy", "somebody/adapter", None, "runs/own.npy"),
    ],
)
def test_a_revision_and_a_place_in_a_repository_are_fetched(tmp_path, monkeypatch, asked, repository, revision, inside):
    def download(name, revision, allow_patterns):
        fetched.append((name, revision))
        (tmp_path / inside).mkdir(parents=True, exist_ok=True)
        patterns.extend(allow_patterns)
        return str(tmp_path)

    fetched, patterns = [], []
    monkeypatch.setattr("prefix_export.prefixes.fold.snapshot_download", download)
    assert fetch_checkpoint(Path(asked)) == tmp_path / inside
    assert fetched == [(repository, revision)]
    wanted = f"{inside}/adapter_model.safetensors" if inside else "adapter_model.safetensors"
    assert any(fnmatch(wanted, pattern) for pattern in patterns)
    assert not any(fnmatch("elsewhere/model.safetensors", pattern) for pattern in patterns) or not inside


def test_a_place_that_a_repository_has_not_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("prefix_export.prefixes.fold.snapshot_download", lambda name, **_: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"^a/b/c@main: expected c in the repository a/b, found none there$"):
        fetch_checkpoint(Path("a/b/c@main"))


def test_a_path_with_an_at_sign_that_is_there_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/a@b").mkdir(parents=True)
    assert split_revision("runs/a@b") == ("runs/a@b", None)
    assert fetch_checkpoint(Path("runs/a@b")) == Path("runs/a@b")
    assert split_revision("runs/other@b") == ("runs/other", "b")
    for name in ("/absolute@b", "../up@b", "a/b@", "@b", "a/b"):
        assert split_revision(name) == (name, None)


def test_a_hub_id_that_is_nowhere_is_told(causal, monkeypatch):
    def download(name, **_):
        raise LocalEntryNotFoundError(f"cannot find {name}\nand more")

    monkeypatch.setattr("prefix_export.prefixes.fold.snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"^somebody/nothing: .* of the Hub: cannot find"):
        fold(Path("somebody/nothing"), causal.shape, pytest.fail)


NARROW = {
    "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "do_layer_norm_before": False, "vocab_size": 96,
}  # fmt: skip


class TestNarrowEmbeddings:
    """OPT-350m's embeddings are half as wide as its layers."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("opt-350m")
        model = AutoModelForCausalLM.from_config(transformers.OPTConfig(**NARROW))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def narrow(cls, folder):
        return load_base_model(str(folder))

    def configs(self):
        return {
            "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, token_dim=16),
            "p-tuning": PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, token_dim=16, encoder_hidden_size=8
            ),
            "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH),
        }

    @pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
    def test_logits_and_tokens_are_pefts(self, folder, narrow, tmp_path, kind):
        adapter = save_adapter(AutoModelForCausalLM.from_pretrained(folder), self.configs()[kind], tmp_path / "adapter")
        (prefix,) = fold(adapter, ModelShape.of_config("opt", narrow.model.config), lambda: narrow).prefixes.values()
        ours = CacheReference(narrow.model, prefix)
        with reference(narrow, prefix, PrefixSource(adapter)) as peft:
            ids = prompt(narrow)
            expected = peft.logits(ids)
            assert np.ptp(expected) > 1
            np.testing.assert_allclose(ours.logits(ids), expected, atol=1e-4)
            assert ours.greedy(ids, 10) == peft.greedy(ids, 10)

    def test_a_prompt_as_wide_as_the_layers_is_refused(self, narrow, tmp_path):
        np.save(tmp_path / "prompt.npy", np.ones((4, 32), np.float32))
        with pytest.raises(PrefixMismatchError, match=r"expected a width of 16 .* or 128 .* found shape"):
            fold(tmp_path / "prompt.npy", narrow.shape, lambda: narrow)


def test_embeddings_that_were_trained_too_are_refused(causal, workshop, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(workshop.root / causal.name)
    adapter = save_adapter(model, KINDS["prefix tuning"]("CAUSAL_LM"), tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.ones(384, 64)}, path)
    with pytest.raises(CheckpointError, match="found embeddings of the model, base_model"):
        fold(adapter, causal.shape, pytest.fail)


def test_numbers_that_are_not_finite_are_told_with_their_file(causal, tmp_path):
    np.save(tmp_path / "prompt.npy", np.full((4, 64), np.nan, np.float32))
    with pytest.raises(CheckpointError, match=r"prompt\.npy: soft prompt: expected finite numbers"):
        fold(tmp_path / "prompt.npy", causal.shape, lambda: causal)
