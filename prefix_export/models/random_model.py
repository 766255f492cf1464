"""Models of real geometry with random weights, for measuring: speed does not depend on the values of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedConfig

from prefix_export.errors import ModelError

from . import BaseModel, load_decoder_config
from .base_model import base_model
from .pretrained import configuration_of, model_without_weights

_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
_LLAMA_3 = {
    **_LLAMA,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}

KNOWN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "distilgpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 6, "n_head": 12},
        "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12},
        "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
        "gpt2-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
        "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
            **_LLAMA,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        "meta-llama/Llama-3.2-1B": {
            **_LLAMA_3,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "head_dim": 64,
        },
        "meta-llama/Llama-3.2-3B": {
            **_LLAMA_3,
            "hidden_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "head_dim": 128,
        },
        "llama-8b": {
            **_LLAMA,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": False,
        },
        "HuggingFaceTB/SmolLM2-135M": {
            **_LLAMA,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
        "Qwen/Qwen2.5-0.5B": {
            **_QWEN,
            "max_position_embeddings": 32768,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
        },
        "Qwen/Qwen2.5-1.5B": {
            **_QWEN,
            "max_position_embeddings": 131072,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
        },
    }
)
"""Configurations by Hub id that need no network, copied from the models' own config.json; llama-8b is Llama 3's."""

_NOISE = 0.02
_DRAWN, _STEP = (1 << 20) + 7, 7919
"""The count of random numbers, and the shift of each weight's numbers against the weight before."""


def random_config(name: str) -> PreTrainedConfig:
    """The configuration of a known model, of a folder or of a Hub id. Only the config.json is read.

    Raises:
        ModelError: the configuration cannot be found or read.
        UnsupportedArchitectureError: the model is not a decoder-only language model.
    """
    if name not in KNOWN or Path(name).is_dir():
        return load_decoder_config(name)
    values = dict(KNOWN[name])
    return configuration_of(values.pop("model_type"), values)


def random_base_model(name: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    """A model with random weights, the same ones every time, and without an end token.

    Each weight repeats one short random draw with another shift, because speed does not depend on values. The
    fingerprint is the hash of the configuration.

    Args:
        name: a name in `KNOWN`, a folder or a Hub id.
        dtype: the type of the weights.

    Raises:
        ModelError: the configuration cannot be found, or is not a causal language model's.
    """
    config = random_config(name)
    try:
        model = model_without_weights(config, dtype)
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"model {name!r}: expected the configuration of a causal language model, found {config.model_type!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    model.tie_weights()
    _fill(model)
    # Without an end token, a generation always has the requested length, in every framework.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    made_of = hashlib.sha256(config.to_json_string().encode()).hexdigest()
    return base_model(name, model.eval(), f"random:{made_of}", None)


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    """Give weights random values, also biases and norms, because zeros and ones could be optimized away."""
    drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0)) * _NOISE
    for index, (name, parameter) in enumerate(model.named_parameters()):
        values = drawn.roll(index * _STEP).to(parameter.dtype)
        flat = parameter.view(-1)
        for first in range(0, len(flat), _DRAWN):
            part = flat[first : first + _DRAWN]
            part.copy_(values[: len(part)])
        if parameter.ndim == 1 and not name.endswith("bias"):
            parameter.add_(1)
