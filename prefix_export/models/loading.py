"""Load a base model by its name; cheap checks run before the weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefix_export.errors import ModelError, UnsupportedArchitectureError
from prefix_export.tokenizers.tokenizer import TOKENIZER_FILES
from prefix_export.trace.attention import probe
from prefix_runtime.generation.tokenizer_file import is_panic

from . import config_file, gguf_model, pretrained
from .base_model import BaseModel, base_model, fingerprint
from .experts import traceable_experts
from .generation_defaults import FILE as GENERATION_CONFIG
from .generation_defaults import check_generation_config
from .gguf_file import Header, read_header
from .source import ModelSource

_CONFIG = "config.json"
_ADAPTER = "adapter_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_MOST_LAYERS = 4096


def load_base_model(name: str) -> BaseModel:
    """Load a base model by its Hub id, `ID@REVISION`, its folder or its GGUF file.

    Hugging Face's cache and offline variables apply. Code that comes with a model is never run, and an adapter beside
    its weights is not applied.

    Raises:
        ModelError: the model cannot be found or loaded, its weights are already quantized, or its generation defaults
            cannot be used; the message says what to do.
        UnsupportedArchitectureError: the model is not a decoder-only language model, or its attention does not go
            through transformers' attention interface.
    """
    source = ModelSource.of(name)
    config = _decoder_config(source)
    _check_architecture(source, config)
    generation = None if source.gguf is not None else source.file(GENERATION_CONFIG)
    check_generation_config(source.name, generation, config.get_text_config().vocab_size)
    model = _load_weights(source, config)
    base = base_model(name, model, fingerprint(model), _load_tokenizer(source))
    return replace(base, revision=source.commit, warnings=tuple(_notes(source, config)))


def load_config(name: str) -> PreTrainedConfig:
    """A model's configuration by its Hub id, `ID@REVISION`, its folder or its GGUF file.

    Raises:
        ModelError: the configuration cannot be found or read, or the model's weights are already quantized.
        UnsupportedArchitectureError: transformers does not have the architecture.
    """
    return _config(ModelSource.of(name))


def load_decoder_config(name: str) -> PreTrainedConfig:
    """A decoder-only model's configuration by its Hub id, `ID@REVISION`, its folder or its GGUF file.

    Raises:
        ModelError: see `load_config`.
        UnsupportedArchitectureError: the model is not a decoder-only language model.
    """
    return _decoder_config(ModelSource.of(name))


def _config(source: ModelSource) -> PreTrainedConfig:
    header = _header(source)
    if header is None:
        _check_config_file(source)
    try:
        config = pretrained.configuration(source)
    except pretrained.FAILURES as error:
        raise _no_config(source, error) from error
    return config if header is None else gguf_model.with_positions(source.name, header, config)


def _header(source: ModelSource) -> Header | None:
    """The checked header of a GGUF file; None for a folder or a repository."""
    if source.gguf is None:
        return None
    header = read_header(source.name, source.gguf)
    gguf_model.check_architecture(source.name, header)
    return header


def _content(source: ModelSource, name: str) -> dict[str, Any]:
    """The object in a JSON file of a model; empty if there is none, because transformers' loader reports that."""
    path = source.file(name)
    return config_file.read_object(path) if path is not None else {}


def _check_config_file(source: ModelSource) -> None:
    """Refuse a config.json of a model that cannot be loaded."""
    content = _content(source, _CONFIG)
    beside = [file for file in config_file.QUANTIZED_FILES if source.file(file) is not None]
    config_file.check_weights_are_plain(source.name, content, beside)
    config_file.own_code(source.name, content)


def _no_config(source: ModelSource, error: Exception) -> ModelError:
    if source.gguf is not None:
        return ModelError(
            f"model {source.name!r}: expected a GGUF file that transformers can load, found "
            f"{pretrained.reason(error, source)}"
        )
    expected = f"model {source.name!r}: expected a Hub id or a folder with a config.json"
    if source.file(_CONFIG) is not None:
        return ModelError(f"{expected} that transformers can read, found {pretrained.reason(error, source)}")
    if source.file(_ADAPTER) is not None:
        return _only_an_adapter(source)
    actual = "a folder without" if Path(source.root).is_dir() else "no such folder"
    return ModelError(f"{expected}, found {actual}: {pretrained.reason(error, source)}")


def _only_an_adapter(source: ModelSource) -> ModelError:
    base = _content(source, _ADAPTER).get("base_model_name_or_path")
    return ModelError(
        f"model {source.name!r}: expected a base model, found an adapter ({_ADAPTER}) without the weights of its base; "
        f"use it as a prefix: --model {base if isinstance(base, str) and base else 'BASE'} --prefix {source.name}"
    )


def _decoder_config(source: ModelSource) -> PreTrainedConfig:
    config = _config(source)
    if config.is_encoder_decoder:
        raise UnsupportedArchitectureError(
            f"model {source.name!r}: expected a decoder-only language model, found the encoder-decoder "
            f"{config.model_type!r}; this version cannot export cross-attention"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedArchitectureError(
            f"model {source.name!r}: expected the configuration of a causal language model, found {config.model_type!r}"
        )
    return config


def _check_architecture(source: ModelSource, config: PreTrainedConfig) -> None:
    """Refuse an architecture that cannot be exported; run it without weights on PyTorch's meta device to see."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MOST_LAYERS:  # their modules would fill the memory
        raise ModelError(f"model {source.name!r}: expected at most {_MOST_LAYERS:,} layers, found {layers:,}")
    try:
        with torch.device("meta"):
            model = pretrained.model_without_weights(config, torch.float32)
    except pretrained.FAILURES as error:
        raise ModelError(
            f"model {source.name!r}: expected a configuration that transformers can build a model from, found "
            f"{pretrained.reason(error, source)}"
        ) from error
    try:
        with traceable_experts(model):
            probe(model)
    except (NotImplementedError, RuntimeError):
        return  # the model reads values, which do not exist yet: `base_model` runs it again with its weights


def _load_weights(source: ModelSource, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        model, report = pretrained.weights(source, config)
    except pretrained.FAILURES as error:
        if isinstance(error, OSError) and source.file(_ADAPTER) is not None:
            raise _only_an_adapter(source) from error
        raise ModelError(
            f"model {source.name!r}: expected a causal language model that transformers can load, found "
            f"{pretrained.reason(error, source)}"
        ) from error
    config_file.check_no_scales(source.name, report["unexpected_keys"])
    if missing := sorted(report["missing_keys"]):
        # transformers replaces missing weights by random values.
        raise ModelError(
            f"model {source.name!r}: expected all weights of {type(model).__name__}, found {len(missing)} missing: "
            f"{', '.join(missing[:3])}"
        )
    return model


def _load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    if not _has_tokenizer(source):
        return None
    try:
        return pretrained.tokenizer(source)
    except BaseException as error:  # the package tokenizers raises plain Exception, and Rust panics
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise ModelError(
            f"model {source.name!r}: expected a tokenizer that transformers can load, found "
            f"{pretrained.reason(error, source)}"
        ) from error


def _has_tokenizer(source: ModelSource) -> bool:
    # Without any of these files, transformers makes an empty tokenizer for some architectures.
    header = _header(source)
    if header is not None:
        return "tokenizer.ggml.model" in header.values
    return any(source.file(file) is not None for file in TOKENIZER_FILES)


def _notes(source: ModelSource, config: PreTrainedConfig) -> Iterator[str]:
    """Warnings about a model's files, one line each."""
    header = _header(source)
    if header is not None:
        yield from gguf_model.windows_left_out(source.name, header, config)
        return
    if (note := config_file.own_code(source.name, _content(source, _CONFIG))) is not None:
        yield note
    if _content(source, _TOKENIZER_CONFIG).get("auto_map"):
        yield (
            f"{source.name}: the code of the tokenizer (auto_map in {_TOKENIZER_CONFIG}) is not run; transformers' own "
            "tokenizer is used, which may split text differently"
        )
    if source.file(_ADAPTER) is not None:
        yield (
            f"{source.name}: the adapter beside the model's weights ({_ADAPTER}) is not applied to them; name a prefix "
            "with --prefix"
        )
