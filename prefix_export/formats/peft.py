"""PEFT prefix-tuning adapters of causal language models.

A folder with `adapter_config.json` and `adapter_model.safetensors`, or a safetensors file with that config beside it.
One tensor, `prompt_embeddings` [prefix_length, 2 * layers * num_key_value_heads * head_dim]: key and value of layer 0,
of layer 1, and so on. With `prefix_projection` the MLP was evaluated when PEFT saved: the tensor is folded either way.

Source: PEFT 0.21.2, `PeftModel.get_prompt` and `get_prompt_embedding_to_save`; text begins at position `prefix_length`
(`_adjust_prompt_learning_kwargs`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_runtime import Geometry, LayerPrefix, Prefix, PrefixError, PrefixMismatchError, Source
from prefix_runtime.storage import sha256_of_file
from prefix_runtime.tensor_file import TensorFile

NAME = "PEFT prefix-tuning adapter"

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_TENSOR = "prompt_embeddings"
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Adapter:
    """An adapter's two files and what its config says."""

    config_path: Path
    weights_path: Path
    config: Mapping[str, Any]


def matches(path: Path) -> bool:
    """Whether the path is a folder with an adapter config, or a safetensors file with one beside it."""
    if path.is_dir():
        return (path / CONFIG_NAME).is_file()
    return path.suffix == ".safetensors" and (path.parent / CONFIG_NAME).is_file()


def open_adapter(path: Path) -> Adapter:
    """The adapter in a folder, or of a safetensors file.

    Raises:
        CheckpointError: its config cannot be read, or it is of another kind; named.
    """
    folder = path if path.is_dir() else path.parent
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    config = _read_config(folder / CONFIG_NAME)
    if not weights.is_file():
        raise CheckpointError(
            f"{weights}: expected the adapter's weights, found nothing there; pickled weights (adapter_model.bin) are "
            "not read: load and save the adapter with PEFT to get safetensors"
        )
    return Adapter(folder / CONFIG_NAME, weights, config)


def describe(path: Path) -> Mapping[str, str]:
    """What the adapter's config and tensor say."""
    adapter = open_adapter(path)
    length, width = _tensor_shape(TensorFile(adapter.weights_path))
    return {
        "prefix length": str(length),
        "width": f"{width} = 2 x layers x key/value heads x head size",
        **{
            shown: str(adapter.config[key])
            for key, shown in (
                ("num_layers", "layers"),
                ("num_attention_heads", "key/value heads"),
                ("token_dim", "key/value heads x head size"),
                ("prefix_projection", "trained behind an MLP"),
                ("base_model_name_or_path", "base model"),
            )
            if adapter.config.get(key) is not None
        },
    }


def read(path: Path, geometry: Geometry) -> Prefix:
    """The adapter's prefix.

    Raises:
        CheckpointError: the adapter is of another kind or inconsistent.
        PrefixError, PrefixMismatchError: damaged or not finite, or for a model of another shape.
    """
    adapter = open_adapter(path)
    file = TensorFile(adapter.weights_path)
    length, width = _tensor_shape(file)
    _check_config(adapter, length)
    layer = geometry.layers[0]
    _check_geometry(adapter, geometry, width)
    slots = file.array(_TENSOR).reshape(length, len(geometry.layers), 2, layer.key_value_heads, layer.head_dim)
    # [length, layers, 2, heads, head_dim] -> [layers, 2, heads, length, head_dim]
    folded = np.ascontiguousarray(slots.transpose(1, 2, 3, 0, 4))
    try:
        return Prefix(
            sites={"decoder": tuple(LayerPrefix(key, value) for key, value in folded)},
            position_base=length,
            source=Source("peft-prefix-tuning", sha256_of_file(adapter.weights_path)),
            metadata=_metadata(adapter),
        )
    except PrefixError as error:
        raise PrefixError(f"{adapter.weights_path}: {error}") from error


def _metadata(adapter: Adapter) -> dict[str, str]:
    base = adapter.config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return {}
    # A folder of the machine that it was trained on says nothing elsewhere, and is nobody's business.
    return {"base_model": Path(base).name if Path(base).is_absolute() else base}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{path}: expected a config of at most {_MAX_CONFIG_BYTES} bytes, found a larger file"
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    for key, expected in (("peft_type", "PREFIX_TUNING"), ("task_type", "CAUSAL_LM")):
        if config.get(key) != expected:
            raise CheckpointError(
                f"{path}: {key}: expected {expected!r}, found {config.get(key)!r}; only prefix tuning of causal "
                "language models is read by this version"
            )
    return config


def _tensor_shape(file: TensorFile) -> tuple[int, int]:
    info = file.tensors.get(_TENSOR)
    if info is None or len(file.tensors) != 1:
        raise CheckpointError(f"{file.path}: expected the tensor {_TENSOR!r} alone, found {sorted(file.tensors)[:5]}")
    if len(info.shape) != 2 or 0 in info.shape:
        raise CheckpointError(
            f"{file.path}: {_TENSOR}: expected shape [prefix_length, 2 * layers * heads * head_dim], found "
            f"{list(info.shape)}"
        )
    return info.shape[0], info.shape[1]


def _check_config(adapter: Adapter, length: int) -> None:
    said = adapter.config.get("num_virtual_tokens")
    if said != length:
        raise CheckpointError(
            f"{adapter.config_path}: num_virtual_tokens: expected {length}, as the tensor in "
            f"{adapter.weights_path.name} has, found {said}"
        )
    submodules = adapter.config.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise CheckpointError(f"{adapter.config_path}: num_transformer_submodules: expected 1, found {submodules}")


def _check_geometry(adapter: Adapter, geometry: Geometry, width: int) -> None:
    """Refuse an adapter for another shape of model, by what its config says and by the tensor itself."""
    first = geometry.layers[0]
    if any(layer != first for layer in geometry.layers):
        raise CheckpointError(f"{adapter.config_path}: PEFT prefixes of models whose layers differ are not read yet")
    for key, expected, what in (
        ("num_layers", len(geometry.layers), "layers"),
        ("num_attention_heads", first.key_value_heads, "key/value heads"),
        (
            "token_dim",
            first.key_value_heads * first.head_dim,
            f"= {first.key_value_heads} heads x head size {first.head_dim}",
        ),
    ):
        said = adapter.config.get(key)
        if said is not None and said != expected:
            raise PrefixMismatchError(f"{adapter.config_path}: {key}: expected {expected} {what}, found {said}")
    expected = 2 * len(geometry.layers) * first.key_value_heads * first.head_dim
    if width != expected:
        raise PrefixMismatchError(
            f"{adapter.weights_path}: {_TENSOR}: expected a width of {expected} = 2 x {len(geometry.layers)} layers x "
            f"{first.key_value_heads} key/value heads x head size {first.head_dim}, found {width}"
        )
