"""A loaded base model: its attention layers, its shape and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefix_export.errors import ModelError, UnsupportedArchitectureError
from prefix_export.trace.attention import AttentionLayer, probe
from prefix_runtime import Geometry, LayerGeometry
from prefix_runtime.prefix.prefix import DECODER

from .hub import shown_name
from .model_shape import ModelShape


@dataclass(frozen=True)
class BaseModel:
    """A frozen model in evaluation mode, in float32 where it was loaded.

    Attributes:
        name: a folder's last part, a GGUF file's stem, or a Hub id without its revision.
        model: the torch module.
        layers: its attention layers.
        geometry: what the runtime has to know of its shape.
        fingerprint: of its weights, see `fingerprint`.
        tokenizer: its own, or None where it has none.
        revision: the commit of a Hub id, if Hugging Face's cache tells it; else the revision that the user named.
        warnings: what the user should know of the model's files, a line each.
    """

    name: str
    model: PreTrainedModel
    layers: tuple[AttentionLayer, ...]
    geometry: Geometry
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase | None
    revision: str | None = None
    warnings: tuple[str, ...] = ()

    @cached_property
    def shape(self) -> ModelShape:
        """What a prefix has to fit; its layers are those that were found by running the model."""
        shape = ModelShape.of_config(self.name, self.model.config, self.geometry.layers)
        embeddings: Any = self.model.get_input_embeddings()
        return replace(shape, embedding_size=int(embeddings.weight.shape[-1]))

    @property
    def generation_config(self) -> GenerationConfig:
        """Its generation defaults."""
        config = self.model.generation_config
        return config if config is not None else GenerationConfig()


def base_model(
    name: str, model: PreTrainedModel, known_by: str, tokenizer: PreTrainedTokenizerBase | None
) -> BaseModel:
    """A base model of a torch module in evaluation mode; `known_by` is its fingerprint.

    Raises:
        ModelError: its configuration does not tell the context's length.
        UnsupportedArchitectureError: its attention does not go through transformers' attention interface.
    """
    layers = probe(model)
    geometry = Geometry(
        sites={DECODER: tuple(LayerGeometry(layer.key_value_heads, layer.head_dim) for layer in layers)},
        context_length=context_length(name, model.config),
        vocab_size=model.config.get_text_config().vocab_size,
    )
    return BaseModel(shown_name(name), model, layers, geometry, known_by, tokenizer)


def cached(cache: DynamicCache) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each layer's keys and values of a cache's first row, [num_key_value_heads, length, head_dim] float32."""
    for layer in cache.layers:
        held: Any = layer  # of no layer that attends are they None
        yield held.keys[0].float().numpy(), held.values[0].float().numpy()


def fingerprint(model: PreTrainedModel) -> str:
    """A text that is the same for the same weights and differs for others: `sha256:` and 64 hexadecimal digits.

    Weights count by shape and content in float32, not by name, order or the precision that they were stored in: a
    library that renames its parameters does not change it. Tied weights count once.
    """
    digests = sorted(_digest(parameter) for parameter in model.parameters())
    return "sha256:" + hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(parameter: torch.nn.Parameter) -> str:
    array = parameter.detach().float().contiguous().numpy()
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(array.data)
    return digest.hexdigest()


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep a model's weights in another type, in place; what it computes positions by stays in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def drop_weights(model: PreTrainedModel) -> None:
    """Free the weights of a model that is no longer needed, in place.

    torch's export keeps its program, and so the model, alive for as long as it likes.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


def context_length(name: str, config: PreTrainedConfig) -> int:
    """The number of positions that a configuration allows; `name` is the model's, for messages.

    Raises:
        ModelError: the configuration gives no such number.
        UnsupportedArchitectureError: its rotary positions depend on the text's length.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise ModelError(
            f"model {name!r}: config.json: max_position_embeddings: expected a number above 0, found {length}"
        )
    kinds = _rotary_kinds(text)
    if "dynamic" in kinds:
        raise UnsupportedArchitectureError(
            f"model {name!r}: expected rotary positions that do not depend on the text's length, found rope type "
            "'dynamic': keys that are cached already would have to change as the text grows"
        )
    if "longrope" in kinds:
        # Beyond this length transformers takes other factors and computes the whole cache anew.
        original = getattr(text, "original_max_position_embeddings", None) or length
        return min(length, int(original))
    return length


def _rotary_kinds(config: PreTrainedConfig) -> set[str]:
    """The rope types of a model: one, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return {str(parameters.get("rope_type")) for parameters in (rope, *nested)}
