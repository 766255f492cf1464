"""Known geometries are those of the published models; random weights are such that nothing can be optimised away."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_export.errors import ModelError, UnsupportedArchitectureError
from prefix_export.models import fingerprint
from prefix_export.random_model import KNOWN, random_config, save_random_model

# Of the weights that their authors publish, tied ones once.
PARAMETERS = {
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
}
# Of a position's keys and values, all layers: layers, key/value heads, head size.
CACHES = {
    "gpt2-medium": (24, 16, 64),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (22, 4, 64),
    "meta-llama/Llama-3.2-1B": (16, 8, 64),
    "meta-llama/Llama-3.2-3B": (28, 8, 128),
    "HuggingFaceTB/SmolLM2-135M": (30, 3, 64),
    "Qwen/Qwen2.5-0.5B": (24, 2, 64),
    "Qwen/Qwen2.5-1.5B": (28, 2, 128),
}


@pytest.fixture
def folder_with_config(workshop, tmp_path):
    """Makes a folder that has an architecture's config.json and nothing else."""

    def make(architecture):
        path = tmp_path / architecture
        path.mkdir()
        (path / "config.json").write_text((workshop.model(architecture) / "config.json").read_text())
        return path

    return make


def test_every_known_model_is_checked_here():
    assert set(PARAMETERS) == set(KNOWN)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_known_model_has_as_many_parameters_as_the_published_one(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(random_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", CACHES)
def test_a_known_model_has_the_keys_and_values_of_the_published_one(name):
    config = random_config(name)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert (config.num_hidden_layers, heads, head_dim) == CACHES[name]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_no_bias_and_no_norm_is_constant(folder_with_config, tmp_path, architecture):
    save_random_model(str(folder_with_config(architecture)), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert vectors
    for name, parameter in vectors.items():
        assert parameter.std() > 0.005, name
        centre = 0 if name.endswith("bias") else 1
        assert abs(parameter.mean() - centre) < 0.1 / math.sqrt(len(parameter)), name


def test_the_weights_are_the_same_every_time_and_the_callers_random_numbers_too(folder_with_config, tmp_path):
    source = str(folder_with_config("llama"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    for name in ("a", "b"):
        save_random_model(source, tmp_path / name)
    assert torch.equal(torch.rand(3), expected)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "b")]
    assert fingerprint(models[0]) == fingerprint(models[1])


def test_there_is_no_end_token(folder_with_config, tmp_path):
    save_random_model(str(folder_with_config("gpt2")), tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "model" / name).read_text()).get("eos_token_id") is None


def test_a_folder_comes_before_a_known_name(workshop, tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text((workshop.model("llama") / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert random_config("gpt2").model_type == "llama"


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"expected a Hub id or a folder with a config\.json"):
        save_random_model(str(tmp_path / "nowhere"), tmp_path / "model")


def test_what_is_no_decoder_is_refused(folder_with_config, tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match="decoder-only"):
        save_random_model(str(folder_with_config("t5")), tmp_path / "model")


def test_what_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="expected the configuration of a causal language model, found 'vit'"):
        save_random_model(str(tmp_path / "vit"), tmp_path / "model")


def test_a_full_disk_is_told_as_one(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match=r"weights cannot be written: .*No space left on device"):
        save_random_model("distilgpt2", tmp_path / "model")
