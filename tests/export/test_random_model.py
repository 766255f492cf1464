"""Known geometries are those of the published models; random weights are such that nothing can be optimised away."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_export.errors import ModelError, UnsupportedArchitectureError
from prefix_export.models import fingerprint
from prefix_export.models.random_model import KNOWN, random_base_model, random_config
from prefix_runtime.prefix.random_prefix import random_prefix

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
    "llama-8b": 8_030_261_248,
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
    "llama-8b": (32, 8, 128),
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
def test_no_bias_and_no_norm_is_constant(folder_with_config, architecture):
    model = random_base_model(str(folder_with_config(architecture))).model
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert vectors
    for name, parameter in vectors.items():
        assert parameter.std() > 0.005, name
        centre = 0 if name.endswith("bias") else 1
        assert abs(parameter.mean() - centre) < 0.1 / math.sqrt(len(parameter)), name


def test_the_weights_are_the_same_every_time_and_the_callers_random_numbers_too(folder_with_config):
    source = str(folder_with_config("llama"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    found = [random_base_model(source) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    assert fingerprint(found[0].model) == fingerprint(found[1].model)
    assert found[0].fingerprint == found[1].fingerprint != fingerprint(found[0].model)


def test_no_two_weights_are_the_same_and_tied_ones_are_one(folder_with_config):
    model = random_base_model(str(folder_with_config("gpt2"))).model
    parameters = list(model.parameters())
    assert len({parameter.detach().numpy().tobytes() for parameter in parameters}) == len(parameters)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_weights_are_made_in_their_type_and_positions_stay_in_float32(folder_with_config):
    source = str(folder_with_config("llama"))
    model, whole = (random_base_model(source, dtype).model for dtype in (torch.float16, torch.float32))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert torch.equal(model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)


def test_there_is_no_end_token(folder_with_config):
    base = random_base_model(str(folder_with_config("gpt2")))
    assert base.model.config.eos_token_id is None
    assert base.generation_config.eos_token_id is None


def test_random_prefixes_fit_the_model_and_differ(folder_with_config):
    base = random_base_model(str(folder_with_config("llama")))
    prefixes = [random_prefix(base.geometry, 5, seed) for seed in (0, 0, 1)]
    base.shape.check(prefixes[0], "prefix")
    assert (prefixes[0].prefix_length, prefixes[0].position_base) == (5, 5)
    assert prefixes[0] == prefixes[1] != prefixes[2]


def test_a_folder_comes_before_a_known_name(workshop, tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text((workshop.model("llama") / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert random_config("gpt2").model_type == "llama"


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"expected a Hub id or a folder with a config\.json"):
        random_base_model(str(tmp_path / "nowhere"))


def test_what_is_no_decoder_is_refused(folder_with_config):
    with pytest.raises(UnsupportedArchitectureError, match="decoder-only"):
        random_base_model(str(folder_with_config("t5")))


def test_what_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="expected the configuration of a causal language model, found 'vit'"):
        random_base_model(str(tmp_path / "vit"))
