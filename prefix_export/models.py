"""The frozen base model: found, loaded, measured and identified."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from optimum.exporters.tasks import TasksManager
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from prefix_runtime import Geometry, LayerGeometry
from prefix_runtime.tokenizer_file import is_panic

from .attention import AttentionLayer, probe
from .errors import ModelError, UnsupportedArchitectureError
from .shape import Shape
from .tokenizer import TOKENIZER_FILES

_TASK = "text-generation"


@dataclass(frozen=True)
class BaseModel:
    """A frozen model in evaluation mode, in float32 where it was loaded.

    Attributes:
        name: as the user named it; a folder by its last part.
        model: the torch module.
        layers: its attention layers.
        geometry: what the runtime has to know of its shape.
        fingerprint: of its weights, see `fingerprint`.
        tokenizer: its own, or None where it has none.
    """

    name: str
    model: PreTrainedModel
    layers: tuple[AttentionLayer, ...]
    geometry: Geometry
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase | None

    @cached_property
    def shape(self) -> Shape:
        """What a prefix has to fit; its layers are those that were found by running the model."""
        return Shape.of_config(self.name, self.model.config, self.geometry.layers)

    @property
    def generation_config(self) -> GenerationConfig:
        """Its generation defaults, of which the runtime reads the end tokens."""
        config = self.model.generation_config
        return config if config is not None else GenerationConfig()


def load_base_model(name: str) -> BaseModel:
    """A base model by its Hub id or its folder; Hugging Face's cache and offline variables apply.

    Raises:
        ModelError: it cannot be found or loaded, or is no decoder-only language model.
        UnsupportedArchitectureError: its attention does not go through transformers' attention interface.
    """
    model = _load_model(name, load_decoder_config(name))
    return base_model(name, model, fingerprint(model), _load_tokenizer(name))


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
        layers=tuple(LayerGeometry(layer.key_value_heads, layer.head_dim) for layer in layers),
        context_length=_context_length(name, model.config),
        vocab_size=model.config.get_text_config().vocab_size,
    )
    shown = Path(name).resolve().name if Path(name).is_dir() else name
    return BaseModel(shown, model, layers, geometry, known_by, tokenizer)


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


def load_config(name: str) -> PreTrainedConfig:
    """A model's configuration by its Hub id or folder.

    Raises:
        ModelError: it cannot be found or read.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(
            f"model {name!r}: expected a Hub id or a folder with a config.json, found "
            f"{'a folder without' if Path(name).is_dir() else 'no such folder'}: {_first_line(error)}"
        ) from error
    return config


def load_decoder_config(name: str) -> PreTrainedConfig:
    """A decoder-only model's configuration by its Hub id or folder.

    Raises:
        ModelError: it cannot be found or read.
        UnsupportedArchitectureError: the model has an encoder.
    """
    config = load_config(name)
    if config.is_encoder_decoder:
        raise UnsupportedArchitectureError(
            f"model {name!r}: expected a decoder-only language model, found the encoder-decoder {config.model_type!r}; "
            "cross-attention needs an export path of its own, which this version does not have"
        )
    return config


def _load_model(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        model_class = TasksManager.get_model_class_for_task(_TASK, framework="pt", model_type=config.model_type)
        model, report = model_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"model {name!r}: expected a causal language model that transformers can load, found {_first_line(error)}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        # transformers makes random ones in their place, others each time.
        raise ModelError(
            f"model {name!r}: expected all weights of {type(model).__name__}, found {len(missing)} missing: "
            f"{', '.join(missing[:3])}"
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _context_length(name: str, config: PreTrainedConfig) -> int:
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
    found = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return {str(parameters.get("rope_type")) for parameters in (found, *nested)}


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    # Without any of these files transformers makes a tokenizer of nothing for some architectures.
    if not any(_has_file(name, file) for file in TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except BaseException as error:  # tokenizers raises Exception itself, and panics
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise ModelError(
            f"model {name!r}: expected a tokenizer that transformers can load, found {_first_line(error)}"
        ) from error
    return tokenizer


def _has_file(name: str, file: str) -> bool:
    found: str | None = cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return found is not None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
