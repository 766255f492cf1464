"""The result of a reader: keys and values, or a soft prompt that only the model can turn into keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import ModelShape
from prefix_runtime import LayerGeometry, LayerPrefix, Prefix, PrefixError, PrefixMismatchError, Source

_AXES = 2  # of a matrix
_MOST_HEAD_BYTES = 256 << 20
_ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "relu": lambda array: np.maximum(array, 0),
}


@dataclass(frozen=True)
class SoftPrompt:
    """Trained embeddings that are put before the embeddings of the text.

    Attributes:
        embeddings: [prefix_length, embedding_size] float32.
        source: the checkpoint that holds them.
        head: tensors of the task's head, see `Prefix`.
        metadata: see `Prefix`.
    """

    embeddings: np.ndarray
    source: Source
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """The content of a checkpoint.

    Attributes:
        parts: the prefixes by name, one for each task or label; a single one has the empty name.
        warnings: one line for each thing that the user should know.
    """

    parts: Mapping[str, Prefix | SoftPrompt]
    warnings: tuple[str, ...] = ()


def folded(matrix: np.ndarray, layers: Sequence[LayerGeometry], where: str) -> tuple[LayerPrefix, ...]:
    """The keys and values in a matrix [prefix_length, slots * heads * head_dim]: k0, v0, k1, v1, and so on.

    Source: PEFT 0.21.2, `PeftModel.get_prompt`; it uses the same `view` and `permute` as Li and Liang's code.

    Raises:
        CheckpointError: the model's layers differ from each other.
        PrefixMismatchError: the width does not fit the layers: the prefix is for another model.
    """
    first = layers[0]
    if any(layer != first for layer in layers):
        raise CheckpointError(f"{where}: prefixes of models whose layers differ are not read yet")
    width = folded_width(layers)
    actual = matrix.shape[1] if matrix.ndim == _AXES else f"shape {list(matrix.shape)}"
    if actual != width:
        raise PrefixMismatchError(
            f"{where}: expected a width of {width} = 2 x {len(layers)} layers x {first.key_value_heads} key/value "
            f"heads x head size {first.head_dim}, found {actual}"
        )
    slots = matrix.reshape(len(matrix), len(layers), 2, first.key_value_heads, first.head_dim)
    # [length, layers, 2, heads, head_dim] -> [layers, 2, heads, length, head_dim]
    arranged = np.ascontiguousarray(slots.transpose(1, 2, 3, 0, 4))
    return tuple(LayerPrefix(key, value) for key, value in arranged)


def folded_width(layers: Sequence[LayerGeometry]) -> int:
    """The width of a matrix of keys and values for these layers: 2 * layers * heads * head_dim."""
    return sum(2 * layer.key_value_heads * layer.head_dim for layer in layers)


def make_prefix(
    sites: Mapping[str, Sequence[LayerPrefix]],
    *,
    moves_positions: bool,
    source: Source,
    weights: Path,
    head: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Prefix:
    """A prefix for some sites.

    Args:
        sites: the layers of each site.
        moves_positions: True if text begins behind the prefix, False if it begins at position 0.
        source: the checkpoint.
        weights: the file, for messages.
        head: tensors of the task's head.
        metadata: see `Prefix`.

    Raises:
        CheckpointError: the head is too large.
        PrefixError: the arrays contain NaN or infinity, or do not fit each other; the message names the file.
    """
    length = max(layer.key.shape[1] for layers in sites.values() for layer in layers)
    most = sum(array.nbytes for array in (head or {}).values())
    if most > _MOST_HEAD_BYTES:
        raise CheckpointError(f"{weights}: expected a head of at most {_MOST_HEAD_BYTES} bytes, found {most}")
    try:
        return Prefix(
            sites={site: tuple(layers) for site, layers in sites.items()},
            position_base=length if moves_positions else 0,
            source=source,
            head=head or {},
            metadata=metadata or {},
        )
    except PrefixError as error:
        raise PrefixError(f"{weights}: {error}") from error


def evaluated(
    inputs: np.ndarray, layers: Sequence[tuple[np.ndarray, np.ndarray]], where: str, activation: str = "tanh"
) -> np.ndarray:
    """The float32 outputs [length, outputs] of a reparameterization MLP, computed in float64 without dropout.

    Args:
        inputs: the trained embeddings [length, width].
        layers: weight [outputs, inputs] and bias [outputs] of each linear layer; an activation is between layers.
        where: names the checkpoint in messages.
        activation: "tanh" or "relu".

    Source: Li and Liang, "Prefix-Tuning", ACL 2021, section 4.3.

    Raises:
        CheckpointError: the layers do not fit each other, or the activation is unknown.
    """
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"{where}: activation: expected one of {', '.join(_ACTIVATIONS)}, found {activation!r}")
    # `Prefix` refuses results that are not finite.
    with np.errstate(all="ignore"):
        outputs = inputs.astype(np.float64)
        for index, (weight, bias) in enumerate(layers):
            _check_linear(weight, bias, outputs, f"{where}: layer {index} of the MLP")
            if index:
                outputs = _ACTIVATIONS[activation](outputs)
            outputs = outputs @ weight.T.astype(np.float64) + bias
        result: np.ndarray = outputs.astype(np.float32)
    return result


def _check_linear(weight: np.ndarray, bias: np.ndarray, inputs: np.ndarray, where: str) -> None:
    is_linear = weight.ndim == inputs.ndim == _AXES and bias.shape == weight.shape[:1]
    if not is_linear or inputs.shape[1] != weight.shape[1]:
        raise CheckpointError(
            f"{where}: expected a weight for inputs of shape {list(inputs.shape)} and a bias of its outputs, found "
            f"shapes {list(weight.shape)} and {list(bias.shape)}"
        )


def check_embedding_size(actual: Sequence[int], shape: ModelShape, where: str) -> None:
    """Refuse a soft prompt whose width differs from the model's embeddings.

    Raises:
        PrefixMismatchError: the prompt is for another model; the message names both widths.
    """
    if len(actual) != _AXES or 0 in actual or actual[1] != shape.embedding_size:
        raise PrefixMismatchError(
            f"{where}: expected [prefix_length, {shape.embedding_size}] as the embeddings of {shape.name!r} have, "
            f"found shape {list(actual)}"
        )
