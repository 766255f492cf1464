"""One array alone, [prefix_length, width]: the model's widths decide between a soft prompt and keys and values.

1. The width of the model's embeddings: a soft prompt.
2. The width 2 * layers * heads * head_dim: keys and values.
3. Both, or neither: an error that names both widths. `--format soft-prompt` or `--format keys-values` decides.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import BOTH, ModelShape
from prefix_runtime import PrefixMismatchError

from . import keys_values, soft_prompt
from .shared.checkpoint import Checkpoint
from .shared.trained import Trained, folded_width

NAME = "array"
TITLE = "one array alone"

_BEFORE_MLP = ("wte.weight", "wte2.weight", "wte_enc.weight", "wte_dec.weight")
_KEYS_AND_VALUES = (2, 3)  # axes of the arrays that `keys_values` recognizes by their width
_MATRIX = 2


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is one matrix, or a batch of one. Embeddings without their MLP are not a prefix."""
    shapes = checkpoint.shapes
    if len(shapes) != 1:
        return False
    ((name, shape),) = shapes.items()
    return len(shape) in _KEYS_AND_VALUES and not name.endswith(_BEFORE_MLP)


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """What the array may be: its width belongs to a model's embeddings, or to all its layers."""
    *_, length, width = _shape(checkpoint)
    return {
        "prefix length": str(length),
        "width": str(width),
        "if it is a soft prompt": f"of models whose embeddings are {width} wide",
        "if it is keys and values": f"of models whose layers x 2 x key/value heads x head size are {width}",
    }


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`."""
    array_shape, where = _shape(checkpoint), str(checkpoint.weights)
    if shape.kind == BOTH:
        return soft_prompt.read(checkpoint, shape)
    ((_, layers),) = shape.sites.items()
    width, embedding = folded_width(layers), shape.embedding_size
    if width == embedding == array_shape[-1]:
        raise CheckpointError(
            f"{where}: expected a width that tells a soft prompt from keys and values, found {width}, which both have "
            f"for {shape.name!r}; say which it is with --format {soft_prompt.NAME} or --format {keys_values.NAME}"
        )
    if array_shape[-1] == embedding and len(array_shape) == _MATRIX:
        return soft_prompt.read(checkpoint, shape)
    if array_shape[-1] == width:
        return keys_values.read(checkpoint, shape)
    first = layers[0]
    raise PrefixMismatchError(
        f"{where}: expected a width of {embedding} (a soft prompt for {shape.name!r}) or {width} (keys and values: 2 x "
        f"{len(layers)} layers x {first.key_value_heads} key/value heads x head size {first.head_dim}), found shape "
        f"{list(array_shape)}"
    )


def _shape(checkpoint: Checkpoint) -> tuple[int, ...]:
    if not matches(checkpoint):
        listed = ", ".join(f"{name!r} {list(shape)}" for name, shape in list(checkpoint.shapes.items())[:4]) or "none"
        raise CheckpointError(f"{checkpoint.weights}: expected one array alone, [prefix_length, width], found {listed}")
    (shape,) = checkpoint.shapes.values()
    return shape
