"""Mixtures of experts: bundles of them agree with PEFT, and what stays unquantized is said."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from prefix_export.build import BuildRequest, build
from prefix_export.errors import UnsupportedArchitectureError
from prefix_export.models import load_base_model
from prefix_export.models.experts import expert_weights, notes, traceable_experts

_SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "mixtral": (transformers.MixtralConfig, {**_SIZES, "num_local_experts": 4}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {**_SIZES, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "decoder_sparse_step": 1},
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders with a random model of each family, whose experts differ."""
    root = tmp_path_factory.mktemp("experts")

    def make(family):
        folder = root / family
        if not folder.exists():
            config_class, sizes = FAMILIES[family]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config_class(**sizes))
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
            model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("family", "precision"), [pytest.param("mixtral", "fp32", marks=pytest.mark.families), ("qwen3_moe", "int8")]
)
def test_a_bundle_agrees_with_peft(workshop, made, tmp_path, family, precision):
    model = made(family)
    result = build(BuildRequest(str(model), {"p": workshop.adapter(model, 4)}, tmp_path / "b", precision=precision))
    assert result.parity["p"].reference.startswith("peft")
    assert max(parity.error for parity in result.parity.values()) < 1e-4
    said = " ".join(result.warnings)
    assert "copies the weights of each expert" in said
    assert ("are not quantized" in said) == (precision == "int8")


def test_the_note_counts_the_bytes_that_stay_in_float32(made):
    model = load_base_model(str(made("mixtral"))).model
    experts = 2 * 4 * 3 * 64 * 96 * 4  # layers, experts, matrices, their sizes, bytes
    total = sum(tensor.numel() for tensor in model.state_dict().values()) * 4
    _, line = notes(model, is_quantized=True)
    assert f"{experts / 1e6:.1f} MB of {total / 1e6:.1f} MB" in line
    assert sum(weight.nbytes for weight in expert_weights(model)) == experts


def test_a_dense_model_has_no_notes(base):
    assert not list(notes(base.model, is_quantized=True))


def test_what_can_be_traced_answers_as_the_model_does_and_is_put_back(made):
    model = load_base_model(str(made("mixtral"))).model
    ids, before = torch.arange(9)[None], model.get_experts_implementation()
    with torch.no_grad():
        expected = model(ids).logits
        with traceable_experts(model):
            assert model.get_experts_implementation() != before
            found = model(ids).logits
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)
    assert model.get_experts_implementation() == before


@pytest.mark.parametrize(
    ("config_class", "sizes", "found"),
    [
        (transformers.GptOssConfig, {"num_local_experts": 4, "head_dim": 16, "layer_types": None}, "s_aux"),
        (transformers.DeepseekV3Config, {"n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                                         "moe_intermediate_size": 32}, "DeepseekV3ForCausalLM"),
        (transformers.NemotronHConfig, {"n_routed_experts": 4, "moe_intermediate_size": 32}, "NemotronHForCausalLM"),
    ],
    ids=["attention sinks", "latent attention", "Mamba layers"],
)  # fmt: skip
def test_other_attention_than_plain_is_refused_by_name_without_weights(tmp_path, config_class, sizes, found):
    config_class(**{**_SIZES, **sizes}).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=found) as caught:
        load_base_model(str(tmp_path))
    assert "\n" not in str(caught.value)
