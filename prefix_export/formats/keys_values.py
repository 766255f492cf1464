"""Keys and values as one array, or as one array for each layer, as scripts save the output of an MLP or of PEFT.

| array | axes |
|---|---|
| a matrix | [prefix_length, 2 * layers * heads * head_dim] |
| the same as a batch | [batch, prefix_length, 2 * layers * heads * head_dim], all rows equal |
| viewed as slots | [1, prefix_length, 2 * layers, heads, head_dim] |
| arranged by slots | [2 * layers, 1, heads, prefix_length, head_dim] |
| an array for each layer | [2, 1, heads, prefix_length, head_dim] |
| a key and a value for each layer | [1, heads, prefix_length, head_dim], also without the 1 |

Slots are k0, v0, k1, v1 and so on. A file of this kind does not say where text begins. This reader assumes behind the
prefix, as in Li and Liang's GPT-2 code, P-tuning v2 and PEFT.

Source: XiangLi1999/PrefixTuning at 48dbaff, `gpt2/train_control.py`, `get_prompt_p5`, `get_prompt_p2_shallow`; PEFT
0.21.2, `PeftModel.get_prompt`; transformers' `past_key_values` before 4.36.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import BOTH, ModelShape
from prefix_runtime import LayerGeometry, LayerPrefix, PrefixMismatchError, Source

from .shared.checkpoint import Checkpoint
from .shared.trained import Trained, folded, folded_width, make_prefix

NAME = "keys-values"
TITLE = "keys and values as arrays"

_PAIRED = re.compile(r"(?:.*[._])?(\d{1,4})\.(0|1|key|value|keys|values|k|v)")
_KEYS = ("0", "key", "keys", "k")
_MATRIX, _BATCH, _SLOTS = 2, 3, 5
_MOST_NUMBERS = 1 << 30
_ORDER = (
    "read as keys and values k0, v0, k1, v1, … with text behind them, as Li and Liang's GPT-2 code has them: the file "
    "does not say so"
)


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is an array of slots, or arrays for each layer. One matrix may also be a soft prompt."""
    shapes = list(checkpoint.shapes.values())
    if len(shapes) == 1:
        return len(shapes[0]) == _SLOTS
    return bool(_per_layer(checkpoint))


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The shapes of its arrays."""
    shapes = checkpoint.shapes
    listed = {name or "array": " x ".join(map(str, shape)) for name, shape in list(shapes.items())[:4]}
    return {"arrays": str(len(shapes)), **listed}


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`."""
    where = str(checkpoint.weights)
    if shape.kind == BOTH:
        raise PrefixMismatchError(
            f"{where}: expected a decoder-only model or an encoder, found {shape.name!r} ({shape.kind}): arrays do not "
            "say which of its attentions they are for"
        )
    _check_size(checkpoint)
    ((site, layers),) = shape.sites.items()
    prefix = make_prefix(
        {site: _layers(checkpoint, layers)},
        moves_positions=True,
        source=Source(NAME, checkpoint.sha256),
        weights=checkpoint.weights,
    )
    return Trained({"": prefix}, (_ORDER,))


def _check_size(checkpoint: Checkpoint) -> None:
    """Refuse arrays that are too large before reading them: a sparse file may claim any size."""
    count = sum(int(np.prod(shape, dtype=object)) for shape in checkpoint.shapes.values())
    if count > _MOST_NUMBERS:
        raise CheckpointError(f"{checkpoint.weights}: expected at most {_MOST_NUMBERS} numbers, found {count}")


def _layers(checkpoint: Checkpoint, layers: Sequence[LayerGeometry]) -> Sequence[LayerPrefix]:
    shapes, where = checkpoint.shapes, str(checkpoint.weights)
    if len(shapes) > 1:
        return _of_layers(checkpoint, layers)
    if not shapes:
        raise CheckpointError(f"{where}: expected an array of keys and values, found none")
    ((name, axes),) = shapes.items()
    if len(axes) in (_MATRIX, _BATCH):
        # Checked before the array is read.
        if 0 in axes or axes[-1] != folded_width(layers):
            raise PrefixMismatchError(f"{where}: expected [prefix_length, {folded_width(layers)}], found {list(axes)}")
        array = checkpoint.array(name)
        return folded(array if array.ndim == _MATRIX else _one_row(array, where), layers, where)
    return _of_slots(checkpoint.array(name), layers, where)


def _one_row(batch: np.ndarray, where: str) -> np.ndarray:
    """The matrix of a batch that repeats one prefix."""
    if not (batch == batch[:1]).all():
        raise CheckpointError(
            f"{where}: expected one prefix, found a batch of {len(batch)} that differ; save each in a file of its own"
        )
    first: np.ndarray = batch[0]
    return first


def _of_slots(array: np.ndarray, layers: Sequence[LayerGeometry], where: str) -> Sequence[LayerPrefix]:
    """The layers of an array [2 * layers, 1, heads, length, head_dim] or [1, length, 2 * layers, heads, head_dim]."""
    first, slots = layers[0], 2 * len(layers)
    heads, size = first.key_value_heads, first.head_dim
    axes = array.shape
    if len(axes) == _SLOTS and 0 not in axes:
        if axes[:3] == (slots, 1, heads) and axes[4] == size:
            return [LayerPrefix(array[2 * index, 0], array[2 * index + 1, 0]) for index in range(len(layers))]
        if axes[0] == 1 and axes[2:] == (slots, heads, size):
            return folded(array[0].reshape(axes[1], -1), layers, where)
    raise PrefixMismatchError(
        f"{where}: expected [{slots}, 1, {heads}, prefix_length, {size}] or [1, prefix_length, {slots}, {heads}, "
        f"{size}], found {list(axes)}"
    )


def _per_layer(checkpoint: Checkpoint) -> dict[int, list[str]]:
    """The names of each layer's arrays, the key first; empty if any name or number of axes does not match."""
    halves: dict[int, dict[bool, str]] = {}
    for name, shape in checkpoint.shapes.items():
        match = _PAIRED.fullmatch(name)
        if match is not None and len(shape) in (3, 4):
            halves.setdefault(int(match[1]), {})[match[2] not in _KEYS] = name
        elif name.isdecimal() and len(shape) == _SLOTS and shape[0] == 2:
            halves.setdefault(int(name[:9]), {})[False] = name
        else:
            return {}
    counts = {len(names) for names in halves.values()}
    is_whole = sorted(halves) == list(range(len(halves))) and len(counts) == 1
    count = sum(len(names) for names in halves.values())
    if not is_whole or count != len(checkpoint.shapes) or (counts == {1} and "0" not in checkpoint.shapes):
        return {}
    return {index: [names[is_value] for is_value in sorted(names)] for index, names in halves.items()}


def _of_layers(checkpoint: Checkpoint, layers: Sequence[LayerGeometry]) -> Sequence[LayerPrefix]:
    names, where = _per_layer(checkpoint), str(checkpoint.weights)
    if len(names) != len(layers):
        listed = (
            f"them of {len(names)}" if names else f"arrays of other names: {', '.join(list(checkpoint.shapes)[:4])}"
        )
        raise PrefixMismatchError(f"{where}: expected keys and values of {len(layers)} layers, found {listed}")
    pairs = [[_without_batch(checkpoint.array(name), where) for name in names[index]] for index in range(len(layers))]
    arranged = [pair if len(pair) == 2 else [pair[0][0], pair[0][1]] for pair in pairs]
    return [_checked(LayerPrefix(*pair), layer, where) for pair, layer in zip(arranged, layers, strict=True)]


def _without_batch(array: np.ndarray, where: str) -> np.ndarray:
    """The array as [heads, length, head_dim] or [2, heads, length, head_dim], without a batch axis."""
    axis = {4: 0, _SLOTS: 1}.get(array.ndim)
    if axis is None:
        return array
    if array.shape[axis] != 1:
        raise CheckpointError(f"{where}: expected a batch of 1, found shape {list(array.shape)}")
    return array.squeeze(axis)


def _checked(pair: LayerPrefix, layer: LayerGeometry, where: str) -> LayerPrefix:
    for array in (pair.key, pair.value):
        if 0 in array.shape or (array.shape[0], array.shape[2]) != (layer.key_value_heads, layer.head_dim):
            raise PrefixMismatchError(
                f"{where}: expected [{layer.key_value_heads}, prefix_length, {layer.head_dim}], found "
                f"{list(array.shape)}"
            )
    return pair
