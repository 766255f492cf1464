"""What a model tells of its attention, and what is refused before anything is traced."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, GptOssForCausalLM

from prefix_export.errors import UnsupportedArchitectureError
from prefix_export.graph.export import export_graph
from prefix_export.trace.attention import AttentionLayer, GroupQueryAttention, attention, check_fast_flavour, probe
from prefix_export.trace.decoder import FastDecoder
from tests.workshop import CONFIGS, layers_of

OFF_THE_INTERFACE = {"bloom": "BloomForCausalLM", "gptj": "GPTJForCausalLM"}
ON_THE_INTERFACE = sorted(set(CONFIGS) - set(OFF_THE_INTERFACE) - {"t5"})


def load(workshop, architecture):
    return AutoModelForCausalLM.from_pretrained(workshop.model(architecture)).eval()


def expected_layer(architecture):
    name, sizes = CONFIGS[architecture]
    config = getattr(transformers, name)(**sizes)
    heads = config.num_attention_heads
    key_value_heads = 1 if architecture == "gpt_bigcode" else getattr(config, "num_key_value_heads", None) or heads
    head_dim = sizes.get("head_dim", config.hidden_size // heads)
    return AttentionLayer(heads, key_value_heads, head_dim, sizes.get("sliding_window"))


@pytest.mark.parametrize("architecture", ON_THE_INTERFACE)
def test_the_probe_finds_what_the_config_says(workshop, architecture):
    assert probe(load(workshop, architecture)) == (expected_layer(architecture),) * layers_of(architecture)


def test_the_probe_finds_a_sliding_window(workshop):
    assert {layer.sliding_window for layer in probe(load(workshop, "mistral_windowed"))} == {24}


@pytest.mark.parametrize(("architecture", "name"), OFF_THE_INTERFACE.items())
def test_an_architecture_off_the_interface_is_refused_by_name_with_what_it_needs(workshop, architecture, name):
    with pytest.raises(UnsupportedArchitectureError, match=f"^{name}: .*AttentionInterface.*export path of its own"):
        probe(load(workshop, architecture))


def spoil(model):
    def fail(*_args, **_kwargs):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), attention(model, fail):
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)


@pytest.mark.parametrize("use", [probe, spoil], ids=["after use", "after an error"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_own_attention_is_restored(workshop, use, implementation):
    model = AutoModelForCausalLM.from_pretrained(workshop.model("llama"), attn_implementation=implementation).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        use(model)
        after = model(input_ids=ids).logits
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_models_own_attention_is_restored_after_a_refusal(workshop):
    model = load(workshop, "bloom")
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedArchitectureError):
        probe(model)
    assert model.config._attn_implementation == before


def test_the_probe_runs_our_function_in_place_of_the_models_attention(workshop):
    model, calls = load(workshop, "gpt2"), []

    def record(module, query, key, value, **_kwargs):
        calls.append((module.layer_idx, tuple(key.shape), tuple(value.shape)))
        return torch.zeros_like(query).transpose(1, 2)

    with torch.no_grad(), attention(model, record):
        model(input_ids=torch.zeros(2, 5, dtype=torch.int64), use_cache=False)
    assert calls == [(index, (2, 4, 5, 16), (2, 4, 5, 16)) for index in range(3)]


def test_a_head_size_that_is_no_multiple_of_8_is_refused():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=24, n_head=2, n_layer=2, vocab_size=8))
    with pytest.raises(UnsupportedArchitectureError, match=r"^GPT2LMHeadModel: layer 0: .*multiple of 8.*found 12$"):
        check_fast_flavour(model, probe(model))


@pytest.mark.parametrize("architecture", ON_THE_INTERFACE)
def test_every_tested_architecture_fits_the_fast_flavour(workshop, architecture):
    model = load(workshop, architecture)
    check_fast_flavour(model, probe(model))


def test_an_argument_that_would_change_the_answer_is_refused_by_name():
    function = GroupQueryAttention([(torch.zeros(1, 1, 4, 8),) * 2], torch.zeros(1), torch.zeros(()))
    module = torch.nn.Linear(1, 1)
    module.layer_idx = 0
    tensors = (torch.zeros(1, 1, 1, 8),) * 3
    with pytest.raises(UnsupportedArchitectureError, match=r"^Linear: .*found the arguments head_mask, s_aux;"):
        function(module, *tensors, s_aux=torch.ones(1), head_mask=1, dropout=0.0)
    function(module, *tensors, s_aux=None, dropout=0.0)
    assert list(function.present) == [0]


def test_attention_sinks_are_refused_by_name(tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 16}
    experts = {"num_hidden_layers": 1, "intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = GptOssConfig(**sizes, **experts, max_position_embeddings=64, rope_parameters={"rope_type": "default"})
    model = GptOssForCausalLM(config).eval()
    with pytest.raises(UnsupportedArchitectureError, match=r"^GptOssForCausalLM: .*s_aux"):
        export_graph(FastDecoder(model, probe(model), torch.float32), 64, tmp_path / "model.onnx", opset=21)
    assert not list(tmp_path.iterdir())
