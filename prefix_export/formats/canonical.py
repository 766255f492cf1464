"""The project's own prefix file; see `prefix_runtime.Prefix`."""

from __future__ import annotations

from collections.abc import Mapping

from prefix_export.models.model_shape import ModelShape
from prefix_runtime import Prefix
from prefix_runtime.prefix.prefix import FORMAT

from .shared.checkpoint import Checkpoint
from .shared.trained import Trained, check_embedding_size

NAME = "prefix-export"
TITLE = "prefix file"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the file says that it is a prefix file."""
    return checkpoint.metadata.get("format") == FORMAT


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Sites, layers, heads, length, positions, origin."""
    return Prefix.load(checkpoint.weights).describe()


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`; the prefix is returned unchanged."""
    prefix = Prefix.load(checkpoint.weights)
    shape.check(prefix, str(checkpoint.weights))
    if prefix.embeddings is not None:
        check_embedding_size(prefix.embeddings.shape, shape, str(checkpoint.weights))
    return Trained({"": prefix})
