"""Prefixes of several tasks as one bank, for a graph that holds them itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prefix_runtime import Prefix
from prefix_runtime.prefix.prefix import DECODER


@dataclass(frozen=True)
class PrefixBank:
    """The prefixes of some tasks, a task's place being its `task_id`.

    Attributes:
        tasks: their names, sorted.
        layers: keys and values of each layer, [tasks, num_key_value_heads, longest, head_dim] float32; a shorter prefix
            is aligned to the right, so that distances to what follows are those of the longest, and zeros before it.
        lengths: of each prefix, [tasks] int64.
        position_bases: the position of each task's first token of text, [tasks] int64.
    """

    tasks: tuple[str, ...]
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    lengths: np.ndarray
    position_bases: np.ndarray

    @classmethod
    def of(cls, prefixes: Mapping[str, Prefix]) -> PrefixBank:
        """The bank of at least one task, all of one model."""
        tasks = tuple(sorted(prefixes))
        ordered = [prefixes[task] for task in tasks]
        longest = max(prefix.prefix_length for prefix in ordered)
        layers = zip(*(prefix.sites[DECODER] for prefix in ordered), strict=True)
        return cls(
            tasks,
            tuple(
                (_stacked([part.key for part in layer], longest), _stacked([part.value for part in layer], longest))
                for layer in layers
            ),
            np.array([prefix.prefix_length for prefix in ordered], np.int64),
            np.array([prefix.position_base for prefix in ordered], np.int64),
        )

    @property
    def longest(self) -> int:
        """The length of the longest prefix."""
        return int(self.lengths.max())

    @property
    def seen(self) -> np.ndarray:
        """Which slots hold something of each prefix, [tasks, longest] bool."""
        return np.arange(self.longest) >= self.longest - self.lengths[:, None]


def _stacked(arrays: list[np.ndarray], length: int) -> np.ndarray:
    """Arrays [heads, length or fewer, head_dim] as one [arrays, heads, length, head_dim] float32."""
    padded = [np.pad(array, ((0, 0), (length - array.shape[1], 0), (0, 0))) for array in arrays]
    return np.stack(padded).astype(np.float32)
