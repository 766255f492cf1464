"""Warnings about a prefix that fits its model but is probably wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prefix_export.formats.shared.untrained import DEVIATION, UNTRAINED, is_normal, is_uniform
from prefix_export.models.model_shape import ModelShape
from prefix_runtime import Prefix

from .task_heads import lint_head

_LARGE_SHARE = 0.5
"""Fraction of a context above which a prefix gets a warning."""
_EQUAL = 1e-3
_ZERO = 1e-3
_MOVED = 1e-2
"""Distance to a word's embedding, relative to its norm, below which the row counts as that word."""
_LESTER = 0.5
"""Bound of a soft prompt's uniform numbers: Lester et al., EMNLP 2021, section 3.2."""


def lint(prefix: Prefix, shape: ModelShape, max_length: int | None = None) -> list[str]:
    """Warnings about a prefix for a model, one line each.

    Args:
        prefix: a prefix that fits the model.
        shape: the model's shape.
        max_length: maximum number of positions for prefix plus text; None takes the model's context.
    """
    return [*_base(prefix, shape), *_windows(prefix, shape, max_length), *_context(prefix, shape, max_length),
            *lint_head(prefix, shape), *_untrained(prefix)]  # fmt: skip


def _base(prefix: Prefix, shape: ModelShape) -> Iterator[str]:
    trained_on = prefix.metadata.get("base_model") or prefix.metadata.get("base_folder", "")
    # Compare the last part of a folder, but the whole Hub id.
    are_ids = "/" in trained_on and "/" in shape.name
    both = (trained_on, shape.name) if are_ids else (Path(trained_on).name, Path(shape.name).name)
    if trained_on and both[0] != both[1]:
        yield f"the prefix says that it was trained on {trained_on!r}, not on {shape.name!r}"


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
    if limit and prefix.prefix_length > _LARGE_SHARE * limit:
        yield f"the prefix takes {prefix.prefix_length} of {limit} positions"


def _untrained(prefix: Prefix) -> Iterator[str]:
    """A warning if keys, values or embeddings still have the distribution that training began with."""
    both = [array for layers in prefix.sites.values() for layer in layers for array in (layer.key, layer.value)]
    arrays = [array for array in both if array.size]  # a layer that was left out has empty arrays
    if arrays and all(float(np.abs(array).max()) <= _ZERO for array in arrays):
        yield "its numbers are almost 0, as PEFT's init_weights 'zero' begins: it may be untrained"
    elif arrays and prefix.prefix_length > 1 and all(_is_constant(array) for array in arrays):
        yield "all positions of the prefix are alike: it may be untrained"
    elif arrays and _is_embedding(np.concatenate([array.reshape(-1) for array in arrays])):
        yield UNTRAINED.format(framework="torch.nn.Embedding")
    if prefix.embeddings is not None:
        yield from lint_prompt(prefix.embeddings)


def lint_prompt(embeddings: np.ndarray, vocabulary: np.ndarray | None = None) -> Iterator[str]:
    """Warnings about a soft prompt before a model turns it into keys and values, one line each.

    Args:
        embeddings: [prefix_length, hidden_size].
        vocabulary: the model's own embeddings [vocabulary, hidden_size]; None skips the comparison with them.
    """
    if _is_embedding(embeddings):
        yield UNTRAINED.format(framework="torch.nn.Embedding")
    if is_uniform(embeddings, _LESTER):
        yield UNTRAINED.format(framework="Lester et al.")
    if vocabulary is not None and _is_of(vocabulary, embeddings):
        yield "its rows still equal embeddings of words, with which training begins: it may be untrained"


def _is_embedding(numbers: np.ndarray) -> bool:
    return any(is_normal(numbers, deviation) for deviation in (1.0, DEVIATION))


def _is_of(vocabulary: np.ndarray, embeddings: np.ndarray) -> bool:
    """Whether each row almost equals a row of the vocabulary."""
    likeness = (
        embeddings @ vocabulary.T - np.einsum("ij,ij->i", vocabulary, vocabulary) / 2
    )  # [length, vocabulary], highest for the nearest
    moved = np.linalg.norm(embeddings - vocabulary[likeness.argmax(1)], axis=1)
    return bool((moved <= _MOVED * np.linalg.norm(embeddings, axis=1)).all())


def _is_constant(array: np.ndarray) -> bool:
    """Whether an array [heads, length, head_dim] hardly changes along its length."""
    spread = float(np.abs(array - array[:, :1]).max())
    return spread <= _EQUAL * float(np.abs(array).max())
