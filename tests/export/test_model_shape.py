"""What configurations tell of keys and values, against the caches of the models that they describe."""

from __future__ import annotations

import pytest
import torch
import transformers

from prefix_export.errors import ModelError
from prefix_export.models.model_shape import ModelShape
from prefix_runtime import LayerGeometry

SIZES = {"vocab_size": 99, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
_LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_FALCON = {**SIZES, "bos_token_id": 1, "eos_token_id": 2}
_LATENT = {**_LLAMA, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
           "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2, "pad_token_id": 0}  # fmt: skip
TOLD = {
    "Falcon, one key for all heads": (transformers.FalconConfig, _FALCON),
    "Falcon, a key for each head": (transformers.FalconConfig, {**_FALCON, "multi_query": False}),
    "Falcon, new decoder": (
        transformers.FalconConfig, {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "MPT": (transformers.MptConfig, {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 99}),
    "BLOOM": (transformers.BloomConfig, {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 99}),
    "Cohere": (transformers.CohereConfig, _LLAMA),
    "Gemma 2": (transformers.Gemma2Config, {**_LLAMA, "head_dim": 16}),
    "StarCoder 2": (transformers.Starcoder2Config, _LLAMA),
}  # fmt: skip
REFUSED = {
    "DeepSeek-V3": (transformers.DeepseekV3Config, _LATENT, r"'deepseek_v3' with latent attention \(kv_lora_rank\)"),
    "DeepSeek-V2": (transformers.DeepseekV2Config, _LATENT, r"'deepseek_v2' with latent attention \(kv_lora_rank\)"),
    "Jamba": (transformers.JambaConfig, {}, "'jamba' with layers of kind "),
    "Gemma 3n": (transformers.Gemma3nTextConfig, {}, r"share keys and values \(num_kv_shared_layers\)"),
}


def cache_of(config):
    """The keys and values [heads, length, head_dim] that a random model of a configuration caches for 5 tokens."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return [(layer.keys.shape[1:], layer.values.shape[1:]) for layer in cache.layers]


@pytest.mark.parametrize("name", TOLD)
def test_a_configuration_tells_what_its_model_caches(name):
    config_class, sizes = TOLD[name]
    config = config_class(**sizes)
    told = ModelShape.of_config(name, config).sites["decoder"]
    expected = [((layer.key_value_heads, 5, layer.head_dim),) * 2 for layer in told]
    assert cache_of(config) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_a_configuration_that_does_not_tell_is_refused_by_name(name):
    config_class, sizes, found = REFUSED[name]
    with pytest.raises(ModelError, match=rf"^model 'base': expected one key and one value .* {found}"):
        ModelShape.of_config("base", config_class(**sizes))


def test_latent_attention_caches_no_keys_and_values_of_its_heads():
    for shapes in cache_of(transformers.DeepseekV3Config(**_LATENT)):
        assert [shape[0] for shape in shapes] == [1, 1], "of 4 heads"


def test_layers_that_were_found_by_running_the_model_are_not_asked_of_its_configuration():
    layers = (LayerGeometry(4, 16),) * 2
    config = transformers.DeepseekV3Config(**_LATENT)
    assert ModelShape.of_config("base", config, layers).sites == {"decoder": layers}


NARROW = {
    "OPT": (transformers.OPTConfig, {**SIZES, "word_embed_proj_dim": 16, "ffn_dim": 32}, 16),
    "OPT, none said": (transformers.OPTConfig, {**SIZES, "ffn_dim": 32}, 64),
    "ELECTRA": (transformers.ElectraConfig, {**SIZES, "embedding_size": 16}, 16),
    "ALBERT": (transformers.AlbertConfig, {**SIZES, "embedding_size": 16}, 16),
    "RemBERT": (transformers.RemBertConfig, {**SIZES, "input_embedding_size": 16}, 16),
    "RoFormer": (transformers.RoFormerConfig, {**SIZES, "embedding_size": None}, 64),
    "BERT": (transformers.BertConfig, SIZES, 64),
}


@pytest.mark.parametrize("name", NARROW)
def test_the_width_of_embeddings_is_the_models_own(name):
    config_class, sizes, expected = NARROW[name]
    config = config_class(**sizes)
    shape = ModelShape.of_config(name, config)
    model = transformers.AutoModel.from_config(config)
    assert shape.embedding_size == model.get_input_embeddings().weight.shape[1] == expected
    assert shape.hidden_size == 64
