"""What silently goes wrong with a prefix that fits its model: said, not refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prefix_export.formats.shared.untrained import DEVIATION, UNTRAINED, is_normal, is_uniform
from prefix_export.models.model_shape import ModelShape
from prefix_runtime import Prefix

from .task_heads import lint_head

_MUCH = 0.5
"""Of a context: a prefix that takes more leaves text the smaller part."""
_ALIKE = 1e-3
_NOTHING = 1e-3
_MOVED = 1e-2
"""Of a word's embedding."""
_LESTER = 0.5
"""Bound of a soft prompt's uniform numbers: Lester et al., EMNLP 2021, section 3.2."""


def lint(prefix: Prefix, shape: ModelShape, max_length: int | None = None) -> list[str]:
    """What a user should know of a prefix under a model, a line each.

    Args:
        prefix: that fits the model.
        shape: the model's.
        max_length: positions that prefix and text may take together; None takes the model's context.
    """
    return [*_base(prefix, shape), *_windows(prefix, shape, max_length), *_context(prefix, shape, max_length),
            *lint_head(prefix, shape), *_untrained(prefix)]  # fmt: skip


def _base(prefix: Prefix, shape: ModelShape) -> Iterator[str]:
    said = prefix.metadata.get("base_model") or prefix.metadata.get("base_folder", "")
    # Of a folder only the last part says anything, of a Hub id all of it.
    both = (said, shape.name) if "/" in said and "/" in shape.name else (Path(said).name, Path(shape.name).name)
    if said and both[0] != both[1]:
        yield f"the prefix says that it was trained on {said!r}, not on {shape.name!r}"


def _windows(prefix: Prefix, shape: ModelShape, max_length: int | None) -> Iterator[str]:
    limit = max_length or shape.context_length
    if not shape.sliding_windows or (limit is not None and min(shape.sliding_windows) >= limit):
        return
    window = min(shape.sliding_windows)
    yield (
        f"layers with a sliding window of {window} positions see the whole prefix during the first "
        f"{max(0, window - prefix.prefix_length)} tokens of text only"
    )


def _context(prefix: Prefix, shape: ModelShape, max_length: int | None) -> Iterator[str]:
    limit = max_length or shape.context_length
    if limit and prefix.prefix_length > _MUCH * limit:
        yield f"the prefix takes {prefix.prefix_length} of {limit} positions"


def _untrained(prefix: Prefix) -> Iterator[str]:
    """Numbers that are still those that training begins with, as far as keys, values or embeddings alone tell."""
    both = [array for layers in prefix.sites.values() for layer in layers for array in (layer.key, layer.value)]
    arrays = [array for array in both if array.size]  # of a layer that was left out there are none
    if arrays and all(float(np.abs(array).max()) <= _NOTHING for array in arrays):
        yield "its numbers are almost 0, as PEFT's init_weights 'zero' begins: it may have been trained hardly or not"
    elif arrays and prefix.prefix_length > 1 and all(_is_constant(array) for array in arrays):
        yield "all positions of the prefix are alike: it may have been trained hardly or not"
    elif arrays and _is_embedding(np.concatenate([array.reshape(-1) for array in arrays])):
        yield UNTRAINED.format(framework="torch.nn.Embedding")
    if prefix.embeddings is not None:
        yield from lint_prompt(prefix.embeddings)


def lint_prompt(embeddings: np.ndarray, vocabulary: np.ndarray | None = None) -> Iterator[str]:
    """What a user should know of a soft prompt before a model turns it into keys and values, a line each.

    Args:
        embeddings: [prefix_length, hidden_size].
        vocabulary: the model's own embeddings [vocabulary, hidden_size], where they are at hand.
    """
    if _is_embedding(embeddings):
        yield UNTRAINED.format(framework="torch.nn.Embedding")
    if is_uniform(embeddings, _LESTER):
        yield UNTRAINED.format(framework="Lester et al.")
    if vocabulary is not None and _is_of(vocabulary, embeddings):
        yield "its rows are still those of words, with which training begins: it may have been trained hardly or not"


def _is_embedding(numbers: np.ndarray) -> bool:
    return any(is_normal(numbers, deviation) for deviation in (1.0, DEVIATION))


def _is_of(vocabulary: np.ndarray, embeddings: np.ndarray) -> bool:
    """Whether each row is one of the vocabulary's, or almost."""
    likeness = (
        embeddings @ vocabulary.T - np.einsum("ij,ij->i", vocabulary, vocabulary) / 2
    )  # [length, vocabulary], highest for the nearest
    moved = np.linalg.norm(embeddings - vocabulary[likeness.argmax(1)], axis=1)
    return bool((moved <= _MOVED * np.linalg.norm(embeddings, axis=1)).all())


def _is_constant(array: np.ndarray) -> bool:
    """Whether [heads, length, head_dim] hardly changes along its length."""
    spread = float(np.abs(array - array[:, :1]).max())
    return spread <= _ALIKE * float(np.abs(array).max())
