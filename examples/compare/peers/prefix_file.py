"""A folded prefix, read from its canonical file, for peers that take one as their initial past."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def read_past(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Key and value of every layer, `[1, num_key_value_heads, prefix_length, head_dim]` float32."""
    tensors = load_file(path)
    return [
        (tensors[f"decoder.{layer}.key"][np.newaxis], tensors[f"decoder.{layer}.value"][np.newaxis])
        for layer in range(len(tensors) // 2)
    ]
