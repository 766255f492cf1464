"""Measure the largest keys and values of each channel: the scales of an int8 cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from prefix_export.models import BaseModel
from prefix_export.prefixes.reference import CacheReference
from prefix_export.progress import SILENT, Progress
from prefix_export.tokenizers.held_out import HeldOut
from prefix_runtime import LayerPrefix, Prefix
from prefix_runtime.prefix.cache_format import LARGEST, SCALES_NAME
from prefix_runtime.prefix.prefix import DECODER

# Other text reaches slightly larger values than the measured text.
_MARGIN = 1.2
_LEAST = 1e-6


def cache_scales(
    base: BaseModel,
    prefixes: Mapping[str, Prefix],
    held_out: Mapping[str | None, HeldOut],
    progress: Progress = SILENT,
) -> tuple[LayerPrefix, ...]:
    """Each layer's scales [num_key_value_heads, 1, head_dim] float32, from the values of texts and prefixes.

    Args:
        base: the frozen model. Each text runs through it once, behind its task's prefix.
        prefixes: the prefixes by task. No value in them exceeds the scales.
        held_out: texts for each task, and for the bare model under None.
        progress: counts the texts.
    """
    progress.phase("measure keys and values", sum(len(texts.texts) for texts in held_out.values()), unit="texts")
    largest = [
        [np.zeros((layer.key_value_heads, 1, layer.head_dim), np.float32) for _ in ("key", "value")]
        for layer in base.layers
    ]
    for task, texts in held_out.items():
        model = CacheReference(base.model, prefixes[task] if task is not None else None)
        for text in texts.texts:
            _widen(largest, model.keys_and_values(text.token_ids), _MARGIN)
            progress.advance()
    for prefix in prefixes.values():
        _widen(largest, ((layer.key, layer.value) for layer in prefix.sites[DECODER]), 1.0)
    return tuple(LayerPrefix(*(np.maximum(part / LARGEST, _LEAST) for part in layer)) for layer in largest)


def save_scales(scales: Iterable[LayerPrefix] | None, folder: Path) -> None:
    """Write the bundle's file of scales; nothing if scales is None, for a cache in floating point."""
    if scales is None:
        return
    tensors: dict[str, np.ndarray] = {}
    for index, layer in enumerate(scales):
        tensors |= {f"{index}.key": layer.key, f"{index}.value": layer.value}
    (folder / SCALES_NAME).write_bytes(save(tensors))


def _widen(largest: list[list[np.ndarray]], layers: Iterable[tuple[np.ndarray, np.ndarray]], margin: float) -> None:
    for maxima, pair in zip(largest, layers, strict=True):
        for index, array in enumerate(pair):
            reached = np.abs(np.asarray(array, np.float32)).max(1, keepdims=True) * np.float32(margin)
            maxima[index] = np.maximum(maxima[index], reached)
