"""What a config.json may hold that has nothing to do with the export, and what is refused before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefix_export.cli import main as cli
from prefix_export.errors import ModelError, UnsupportedArchitectureError
from prefix_export.models import load_base_model, load_config
from prefix_export.prefixes.fold import fold_for_bundle
from prefix_runtime import Bundle


@pytest.fixture
def folder(workshop, tmp_path):
    """A copy of a Llama folder, to be changed and broken."""
    return Path(shutil.copytree(workshop.model("llama"), tmp_path / "model"))


@pytest.fixture(scope="module")
def llama(workshop):
    return load_base_model(str(workshop.model("llama")))


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder, kind=ModelError):
    with pytest.raises(kind) as caught:
        load_base_model(str(folder))
    message = str(caught.value)
    assert message.startswith(f"model {str(folder)!r}: ")
    assert "\n" not in message
    return message


def without_weights(folder):
    """Let a test fail with another message if weights are looked at first."""
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_3"},
        {"attn_implementation": "flex_attention"},
        {"_attn_implementation": {"": "flash_attention_2", "text_config": "flash_attention_2"}},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "nonsense"},
        {"_experts_implementation": "sonicmoe"},
        {"output_attentions": True, "_attn_implementation": "flash_attention_2"},
        {"use_cache": False, "return_dict": False, "output_hidden_states": True},
        {"torch_dtype": "float16"},
        {"dtype": "bfloat16"},
        {"_name_or_path": "/home/somebody/train", "_commit_hash": "0123", "transformers_version": "4.30.0"},
        {"quantization_config": None},
        {"quantization_config": {}},
    ],
    ids=",".join,
)
def test_leftovers_of_training_change_nothing(llama, folder, changes):
    configure(folder, **changes)
    base = load_base_model(str(folder))
    assert base.fingerprint == llama.fingerprint
    assert base.model.config._attn_implementation == llama.model.config._attn_implementation == "sdpa"
    assert base.warnings == ()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, llama.model(ids).logits)


def test_what_config_json_asks_for_does_not_reach_the_bundle(llama, folder, tmp_path):
    configure(folder, _attn_implementation="flash_attention_2", use_cache=False, auto_map={"AutoConfig": "m.C"})
    load_base_model(str(folder)).model.config.save_pretrained(tmp_path / "saved")
    llama.model.config.save_pretrained(tmp_path / "plain")
    saved, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "plain"))
    assert saved == plain


METHODS = ["aqlm", "auto-round", "awq", "bitnet", "compressed-tensors", "eetq", "exl2", "fbgemm_fp8", "fp8", "gptq",
           "hqq", "mxfp4", "quanto", "torchao"]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_quantized_weights_are_refused_by_name_before_they_are_read(folder, method):
    configure(folder, quantization_config={"quant_method": method})
    without_weights(folder)
    message = refusal(folder)
    assert f"found weights quantized by {method} (config.json: quantization_config)" in message
    assert "use the original repository" in message


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, r"bitsandbytes \(4 bits\) \(config.json: quantization_c"),
        ({"quantization_config": {"_load_in_8bit": True, "quant_method": "bitsandbytes"}}, r"bitsandbytes \(8 bits\)"),
        ({"quantization_config": {"bits": 4}}, "a method that it does not name"),
        ({"quantization_config": {"quant_method": ["x"] * 99}}, r"\['x', 'x'"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"compression_config": {"format": "pack-quantized"}}, r"config.json: compression_config"),
        ({"quantization": {"bits": 4, "group_size": 64}}, r"config.json: quantization\)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, r"awq \(config.json: text_config.quant"),
    ],
    ids=["4 bits", "8 bits", "unnamed", "absurd", "modelopt", "compression", "mlx", "nested"],
)
def test_quantized_weights_are_found_however_config_json_says_it(folder, changes, found):
    configure(folder, **changes)
    without_weights(folder)
    with pytest.raises(ModelError, match=found):
        load_config(str(folder))
    assert len(refusal(folder)) < 500


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_quantized_weights_are_found_by_the_file_beside_config_json(folder, file):
    (folder / file).write_text("{}")
    without_weights(folder)
    assert file in refusal(folder)


@pytest.mark.parametrize("scale", ["SCB", "weight_scale_inv", "absmax"])
def test_scales_without_a_word_in_config_json_are_refused(folder, scale):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{scale}"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"(model.layers.0.mlp.up_proj.{scale})" in refusal(folder)


def test_code_beside_a_known_architecture_is_not_run_and_the_user_is_told(llama, folder, tmp_path):
    configure(folder, auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    base = load_base_model(str(folder))
    assert base.fingerprint == llama.fingerprint
    (warning,) = base.warnings
    assert "the code that comes with the model (auto_map) is not run; transformers' own 'llama' is used" in warning
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_not_run_and_the_user_is_told(workshop, tmp_path):
    folder = Path(shutil.copytree(workshop.model("gpt2", tokenizer=True), tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    base = load_base_model(str(folder))
    assert base.tokenizer("the fox")["input_ids"]
    (warning,) = base.warnings
    assert "the code of the tokenizer (auto_map in tokenizer_config.json) is not run" in warning
    assert not (tmp_path / "ran").exists()


def test_a_bundle_that_wants_to_run_code_does_not(bundle, gpt2_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    opened = Bundle.open(bundle)  # which compares sizes: a hostile bundle's manifest would be right
    configure(bundle, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (bundle / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedArchitectureError, match="never runs code that comes with a model"):
        fold_for_bundle(gpt2_adapter, opened)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def both(folder, workshop):
    """A base model and an adapter for it in one folder."""
    for file in workshop.adapter(workshop.model("llama"), 3).glob("adapter_*"):
        shutil.copy(file, folder)
    return folder


def test_an_adapter_beside_its_base_is_not_applied_and_the_user_is_told(llama, both):
    base = load_base_model(str(both))
    assert type(base.model) is type(llama.model)
    assert base.fingerprint == llama.fingerprint
    assert not base.model._hf_peft_config_loaded
    (warning,) = base.warnings
    assert "adapter_config.json" in warning


@pytest.mark.parametrize("keeps_config", [False, True])
def test_an_adapter_in_place_of_a_base_is_named(both, keeps_config):
    without_weights(both)
    if not keeps_config:
        (both / "config.json").unlink()
    settings = json.loads((both / "adapter_config.json").read_text())
    (both / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "org/base"}))
    message = refusal(both)
    assert "found an adapter (adapter_config.json) without the weights of its base" in message
    assert f"--model org/base --prefix {both}" in message


@pytest.mark.parametrize("architecture", ["bloom", "gptj"])
def test_an_architecture_that_cannot_be_exported_is_refused_before_weights_are_read(workshop, tmp_path, architecture):
    folder = Path(shutil.copytree(workshop.model(architecture), tmp_path / "model"))
    without_weights(folder)
    with pytest.raises(UnsupportedArchitectureError, match=r"AttentionInterface"):
        load_base_model(str(folder))


def test_a_configuration_that_makes_no_model_is_refused_before_weights_are_read(folder):
    configure(folder, num_attention_heads=0)
    without_weights(folder)
    refusal(folder)


def test_more_layers_than_any_model_has_are_refused(folder):
    configure(folder, num_hidden_layers=10**9)
    assert "expected at most 4,096 layers, found 1,000,000,000" in refusal(folder)


def test_a_file_that_is_no_model_is_refused(folder):
    message = refusal(folder / "config.json")
    assert "expected a Hub id, a folder or a file that ends in .gguf" in message


def test_embeddings_narrower_than_the_hidden_size_are_exported(tmp_path, workshop):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=64, word_embed_proj_dim=32, ffn_dim=96, num_attention_heads=4,
        num_hidden_layers=2, max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    adapter = workshop.adapter(tmp_path / "opt", 4)
    arguments = ["build", "--model", tmp_path / "opt", "--prefix", f"p={adapter}", "--output", tmp_path / "bundle"]
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "peft" in result.output
