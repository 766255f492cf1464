"""A soft prompt that stands alone: `.npy`, or a tensor that `torch.save` wrote, [prefix_length, hidden_size].

Source: google-research/prompt-tuning, `prompts.from_array`; Lester et al., "The Power of Scale for Parameter-Efficient
Prompt Tuning", EMNLP 2021.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefix_export.errors import CheckpointError
from prefix_export.shape import Shape
from prefix_runtime import Source

from .checkpoint import Checkpoint
from .trained import SoftPrompt, Trained, check_hidden_size

NAME = "soft-prompt"
TITLE = "soft prompt array"

_AXES = 2
_LONGEST = 4096  # an embedding table, which has as many axes, is of a whole vocabulary


def matches(checkpoint: Checkpoint) -> bool:
    """Whether it is one array without a name, or one of two axes alone in its file."""
    shapes = checkpoint.shapes
    return list(shapes) == [""] and len(shapes[""]) == _AXES


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Its shape."""
    length, width = _shape(checkpoint)
    return {"prefix length": str(length), "hidden size": str(width)}


def read(checkpoint: Checkpoint, shape: Shape) -> Trained:
    """See `formats.read`."""
    where = str(checkpoint.weights)
    # Before anything is read: a file may be a hole of any size.
    length, width = _shape(checkpoint)
    check_hidden_size((length, width), shape, where)
    if length > _LONGEST:
        raise CheckpointError(
            f"{where}: expected a soft prompt of at most {_LONGEST} positions, found {length}, as a table of "
            "embeddings has"
        )
    embeddings = checkpoint.array("")
    return Trained({"": SoftPrompt(embeddings.astype("float32"), Source(NAME, checkpoint.sha256))})


def _shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """Length and width of the one array."""
    if not matches(checkpoint):
        found = ", ".join(f"{name!r} {list(shape)}" for name, shape in list(checkpoint.shapes.items())[:4]) or "none"
        raise CheckpointError(f"{checkpoint.weights}: expected one array alone, [length, hidden size], found {found}")
    length, width = checkpoint.shapes[""]
    return length, width
