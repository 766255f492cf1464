"""PEFT's adapters against PEFT itself: the same keys and values, or a refusal that says why."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from prefix_export import formats
from prefix_export.build import BuildRequest, build
from prefix_export.errors import CheckpointError
from prefix_export.models import load_base_model
from prefix_runtime import PrefixError, PrefixMismatchError, PrefixRuntimeError
from tests.export.conftest import read_prefix

WEIGHTS = "adapter_model.safetensors"


def pefts_cache(model, adapter):
    """The keys and values of each layer, [heads, length, head_dim], that PEFT hands to the model."""
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    with torch.no_grad():
        cache = wrapped.get_prompt(1)
    return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cache.layers]


def assert_equal_to_pefts(prefix, model, adapter):
    layers = prefix.sites["decoder"]
    expected = pefts_cache(model, adapter)
    assert len(layers) == len(expected) == 3
    for layer, (key, value) in zip(layers, expected, strict=True):
        assert np.ptp(key) > 1
        np.testing.assert_array_equal(layer.key, key)
        np.testing.assert_array_equal(layer.value, value)


@pytest.mark.parametrize("projection", [False, True], ids=["matrix", "projection"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_bigcode"])
def test_folded_tensors_equal_pefts_own_cache(workshop, architecture, projection):
    model = workshop.model(architecture)
    adapter = workshop.adapter(model, 5, projection=projection)
    prefix = read_prefix(adapter, load_base_model(str(model)).shape)
    assert list(prefix.sites) == ["decoder"]
    assert_equal_to_pefts(prefix, model, adapter)


@pytest.mark.parametrize(
    ("dtype", "folded"), [(torch.float16, np.float16), (torch.bfloat16, np.float32)], ids=["float16", "bfloat16"]
)
def test_a_half_precision_adapter_equals_pefts_own_cache(gpt2, adapter, base, edit, dtype, folded):
    edit(adapter, lambda tensor: {"prompt_embeddings": tensor.to(dtype)})
    prefix = read_prefix(adapter, base.shape)
    assert prefix.dtype == folded
    assert_equal_to_pefts(prefix, gpt2, adapter)


def test_a_weights_file_with_its_config_beside_it_reads_like_its_folder(gpt2_adapter, adapter, base):
    file = (adapter / WEIGHTS).rename(adapter / "e2e.safetensors")
    assert read_prefix(file, base.shape) == read_prefix(gpt2_adapter, base.shape)


def test_text_begins_behind_the_prefix(adapter, base):
    prefix = read_prefix(adapter, base.shape)
    assert prefix.position_base == prefix.prefix_length == 3


def test_the_source_is_the_weights_file(adapter, base):
    source = read_prefix(adapter, base.shape).source
    assert source.format == "peft-prefix-tuning"
    assert source.sha256 == hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("org/model", {"base_model": "org/model"}),
        ("gpt2", {"base_model": "gpt2"}),
        ("/home/someone/secret/model", {"base_folder": "model"}),
        ("./model", {"base_folder": "model"}),
        ("../../a/model/", {"base_folder": "model"}),
        ("C:\\Users\\someone\\model", {"base_folder": "model"}),
        ("runs/a/model", {"base_folder": "model"}),
        ("..", {}),
        ("", {}),
        (7, {}),
    ],
)
def test_the_base_model_is_kept_without_the_machines_folders(adapter, base, edit, said, kept):
    metadata = read_prefix(edit(adapter, base_model_name_or_path=said), base.shape).metadata
    assert {name: value for name, value in metadata.items() if name.startswith("base_")} == kept


def test_an_adapter_describes_itself(adapter, edit):
    edit(adapter, base_model_name_or_path="org/model")
    described = formats.describe(adapter)
    assert described["format"] == "PEFT adapter"
    assert (described["prefix length"], described["layers"], described["key/value heads"]) == ("3", "3", "4")
    assert described["base model"] == "org/model"


def refused(error, path, shape, *parts):
    """Check that reading fails with this error and that the message holds each of the parts."""
    with pytest.raises(error) as caught:
        formats.read(path, shape)
    for part in parts:
        assert part in str(caught.value)


def test_an_adapter_of_another_kind_is_refused_by_name(workshop, base, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    model = AutoModelForCausalLM.from_pretrained(workshop.model("gpt2"))
    get_peft_model(model, config).save_pretrained(tmp_path / "other")
    refused(CheckpointError, tmp_path / "other", base.shape, "PEFT adapter (peft)", "of kind 'LORA'")


def test_an_adapter_of_an_encoder_decoder_is_refused_for_a_decoder(workshop, base, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(workshop.model("t5"))
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(tmp_path / "other")
    refused(PrefixMismatchError, tmp_path / "other", base.shape, "task_type", "decoder-only model", "SEQ_2_SEQ_LM")


def test_an_adapter_without_a_config_is_refused(adapter, base):
    (adapter / "adapter_config.json").unlink()
    for path in (adapter, adapter / WEIGHTS):
        refused(CheckpointError, path, base.shape, WEIGHTS, "expected adapter_config.json beside a PEFT adapter")


def test_a_config_in_the_folder_above_is_taken_and_said(adapter, base):
    expected = read_prefix(adapter, base.shape)
    (adapter / "checkpoint-3").mkdir()
    (adapter / WEIGHTS).rename(adapter / "checkpoint-3" / WEIGHTS)
    trained = formats.read(adapter, base.shape)
    assert trained.parts[""] == expected
    found = adapter / "adapter_config.json"
    assert trained.warnings[-1].endswith(f"no adapter_config.json is beside it; {found} is taken for its own")


def test_an_adapter_without_weights_is_refused(adapter, base):
    (adapter / WEIGHTS).unlink()
    refused(CheckpointError, adapter, base.shape, str(adapter), "found no file of tensors")


def test_pickled_weights_are_refused_and_never_unpickled(adapter, gpt2, base, trap, tmp_path):
    (adapter / WEIGHTS).unlink()
    trap.set(adapter / "adapter_model.bin")
    refused(CheckpointError, adapter, base.shape, "adapter_model.bin", "safetensors")
    refused(
        CheckpointError, adapter / "adapter_model.bin", base.shape, "a pickle of dense tensors alone", "safetensors"
    )
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        build(BuildRequest(str(gpt2), {"task": adapter}, tmp_path / "out"))
    assert not trap.sprung
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_is_called_safetensors_is_never_run(adapter, base, trap):
    trap.set(adapter / WEIGHTS)
    refused(CheckpointError, adapter, base.shape, str(adapter / WEIGHTS), "expected a pickle of dense tensors alone")
    assert not trap.sprung


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"{", ["expected JSON"]),
        (b"", ["expected JSON"]),
        (b"\xff\xfe{}", ["expected JSON"]),
        (b"[" * 100_000, ["expected JSON"]),
        (b"[]", ["expected a JSON object", "found list"]),
        (b"{}", ["peft_type", "PREFIX_TUNING", "None"]),
        (b" " * (1 << 20) + b"{}", ["at most 1048576 bytes", "larger"]),
    ],
    ids=["cut off", "empty", "not UTF-8", "too deep", "a list", "no fields", "too large"],
)
def test_a_config_that_is_none_is_refused(adapter, base, content, parts):
    path = adapter / "adapter_config.json"
    path.write_bytes(content)
    refused(CheckpointError, adapter, base.shape, str(path), *parts)


def test_without_a_task_type_pefts_own_model_reads_no_prefix_and_this_refuses(gpt2, adapter, base, edit):
    config = PrefixTuningConfig(num_virtual_tokens=3)
    with pytest.raises(KeyError, match="None"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2), config)
    edit(adapter, task_type=None)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(gpt2).eval()(input_ids=ids).logits
        wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), adapter).eval()
        assert torch.equal(wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, plain)
    refusal = "PeftModel ignores its prefix"
    refused(CheckpointError, adapter, base.shape, "adapter_config.json", "task_type", "CAUSAL_LM", refusal)


@pytest.mark.parametrize("said", [4, "3", None])
def test_a_prefix_length_that_the_tensor_contradicts_is_refused(adapter, base, edit, said):
    edit(adapter, num_virtual_tokens=said)
    refused(CheckpointError, adapter, base.shape, "adapter_config.json", "num_virtual_tokens", "expected 3", f"{said}")


def test_an_encoder_decoders_submodules_are_refused(adapter, base, edit):
    edit(adapter, num_transformer_submodules=2)
    refused(CheckpointError, adapter, base.shape, "num_transformer_submodules", "expected 1", "found 2")


@pytest.mark.parametrize(
    ("field", "said", "parts"),
    [
        ("num_layers", 4, ["expected 3 layers", "found 4"]),
        ("num_attention_heads", 2, ["expected 4 key/value heads", "found 2"]),
        ("token_dim", 32, ["expected 64 = 4 heads x head size 16", "found 32"]),
    ],
)
def test_an_adapter_for_another_shape_of_model_is_refused_by_its_config(adapter, base, edit, field, said, parts):
    edit(adapter, **{field: said})
    refused(PrefixMismatchError, adapter, base.shape, "adapter_config.json", field, *parts)


@pytest.mark.parametrize("width", [2 * 4 * 64, 2 * 3 * 32, 2 * 3 * 64 + 1], ids=["layers", "heads", "odd"])
def test_an_adapter_for_another_shape_of_model_is_refused_by_its_tensor(adapter, base, edit, width):
    # Older versions of PEFT may leave the model's shape out of the config.
    edit(
        adapter,
        lambda _: {"prompt_embeddings": torch.ones(3, width)},
        num_layers=None,
        num_attention_heads=None,
        token_dim=None,
    )
    message = ["expected a width of 384 = 2 x 3 layers x 4 key/value heads x head size 16", f"found {width}"]
    refused(PrefixMismatchError, adapter, base.shape, str(adapter / WEIGHTS), *message)


def test_an_adapter_that_peft_made_for_another_model_is_refused(workshop, base):
    adapter = workshop.adapter(workshop.model("llama"), 5)
    refused(PrefixMismatchError, adapter, base.shape, "expected 4 key/value heads", "found 2")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(adapter, base, edit, number):
    def spoil(tensor):
        tensor[2, 64 + 16 + 5] = number  # slot 1: the value of layer 0; head 1, dimension 5
        return {"prompt_embeddings": tensor}

    edit(adapter, spoil)
    place = ["decoder.0.value", "expected finite numbers", f"found {number}", "[1, 2, 5]"]
    refused(PrefixError, adapter, base.shape, str(adapter / WEIGHTS), *place)


@pytest.mark.parametrize("kept", [4, 8, 50, -1, -400])
def test_a_truncated_weights_file_is_refused(adapter, base, kept):
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    refused(PrefixError, adapter, base.shape, str(path), "expected a whole safetensors file")


def test_a_flipped_bit_is_refused_or_changes_the_recorded_hash(adapter, base):
    path = adapter / WEIGHTS
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    original = read_prefix(adapter, base.shape)
    refusals = 0
    for position in (*range(header), header, len(whole) - 1):
        for bit in (0, 6):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.unlink()  # some file systems wait for the disk when a file is emptied instead
            path.write_bytes(damaged)
            try:
                prefix = read_prefix(adapter, base.shape)
            except (PrefixRuntimeError, CheckpointError) as error:
                assert str(path) in str(error)  # noqa: PT017  # most flips are refused, those of free text are not
                refusals += 1
            else:
                assert prefix.source != original.source
    assert refusals > header, "a header's bits are hardly ever free"


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        (lambda t: {"prompt_encoder": t, "other": t.clone()}, ["PEFT adapter (peft)", "'PREFIX_TUNING'"]),
        (lambda t: {"prompt_embeddings": t.flatten()}, ["expected shape [prefix_length", "found [1152]"]),
        (lambda t: {"prompt_embeddings": t[None]}, ["expected shape [prefix_length", "found [1, 3, 384]"]),
        (lambda t: {"prompt_embeddings": t[:0]}, ["expected shape [prefix_length", "found [0, 384]"]),
    ],
    ids=["other name", "1-D", "3-D", "empty"],
)
def test_tensors_that_are_no_prefix_are_refused(adapter, base, edit, tensors, parts):
    refused(CheckpointError, edit(adapter, tensors), base.shape, str(adapter / WEIGHTS), *parts)


def test_a_head_beside_the_prefix_is_kept(adapter, base, edit):
    weight = torch.ones(2, 64)
    edit(adapter, lambda tensor: {"prompt_embeddings": tensor, "base_model.score.weight": weight}, task_type="SEQ_CLS")
    head = read_prefix(adapter, base.shape).head
    assert list(head) == ["score.weight"]
    np.testing.assert_array_equal(head["score.weight"], weight.numpy())


@pytest.mark.parametrize(("dtype", "name"), [(torch.int64, "I64"), (torch.float64, "F64")])
def test_another_dtype_is_refused(adapter, base, edit, dtype, name):
    edit(adapter, lambda tensor: {"prompt_embeddings": tensor.to(dtype)})
    refused(PrefixError, adapter, base.shape, str(adapter / WEIGHTS), "expected float32, float16", f"found {name}")


def test_reading_changes_nothing_in_the_folder(adapter, base):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    read_prefix(adapter, base.shape)
    formats.describe(adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_the_tensor_that_peft_saved_is_folded_whole(adapter, base):
    # Every number occurs once: the fold is a permutation of the file.
    prefix = read_prefix(adapter, base.shape)
    folded = np.concatenate([np.stack([layer.key, layer.value]).ravel() for layer in prefix.sites["decoder"]])
    saved = load_file(adapter / WEIGHTS)["prompt_embeddings"].numpy()
    np.testing.assert_array_equal(np.sort(folded), np.sort(saved.ravel()))
