"""A soft prompt as one array: a `.npy` file, or a tensor from `torch.save`, [prefix_length, embedding_size].

Source: google-research/prompt-tuning, `prompts.from_array`; Lester et al., "The Power of Scale for Parameter-Efficient
Prompt Tuning", EMNLP 2021.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import ModelShape
from prefix_runtime import Source

from .shared.checkpoint import Checkpoint
from .shared.trained import SoftPrompt, Trained, check_embedding_size

NAME = "soft-prompt"
TITLE = "soft prompt array"

_AXES = 2
_LONGEST = 4096  # an embedding table has as many axes, but a row for every token of the vocabulary


def matches(checkpoint: Checkpoint) -> bool:
    """Always False: without a model, a soft prompt looks like keys and values; see `lone_array`."""
    del checkpoint
    return False


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Its shape."""
    _, (length, width) = _array(checkpoint)
    return {"prefix length": str(length), "embedding size": str(width)}


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`."""
    where = str(checkpoint.weights)
    # Check the shape before reading: a sparse file may claim any size.
    name, (length, width) = _array(checkpoint)
    check_embedding_size((length, width), shape, where)
    if length > _LONGEST:
        raise CheckpointError(
            f"{where}: expected a soft prompt of at most {_LONGEST} positions, found {length}, as a table of "
            "embeddings has"
        )
    embeddings = checkpoint.array(name)
    return Trained({"": SoftPrompt(embeddings.astype("float32"), Source(NAME, checkpoint.sha256))})


def _array(checkpoint: Checkpoint) -> tuple[str, tuple[int, int]]:
    """Name, length and width of the one array."""
    shapes = list(checkpoint.shapes.items())
    if len(shapes) != 1 or len(shapes[0][1]) != _AXES:
        listed = ", ".join(f"{name!r} {list(shape)}" for name, shape in shapes[:4]) or "none"
        raise CheckpointError(f"{checkpoint.weights}: expected one array alone, [length, width], found {listed}")
    name, (length, width) = shapes[0]
    return name, (length, width)
