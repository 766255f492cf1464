"""Queries, keys and values that a projection makes beside one another for each head (GPT-NeoX)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .nodes import array_of, made_by, set_packed, swaps_heads
from .projections import projected, projection_of


def pack_interleaved(model: ir.Model, node: ir.Node) -> None:
    """Query, key and value of a head beside one another (GPT-NeoX): the projection makes those of all heads so."""
    parted = [made_by(value, "Reshape") for value in node.inputs[:3]]
    swapped = [made_by(part.inputs[0], "Transpose") for part in parted if part is not None]
    parts = [part.inputs[0] for part in swapped if part is not None and swaps_heads(part)]
    split = made_by(parts[0], "Split") if len(parts) == 3 else None
    if split is None or list(split.outputs) != parts:
        return
    transpose = made_by(split.inputs[0], "Transpose")
    heads = made_by(transpose.inputs[0], "Reshape") if transpose is not None and swaps_heads(transpose) else None
    projection = projection_of(heads.inputs[0]) if heads is not None else None
    shape = heads.outputs[0].shape if heads is not None else None
    count = node.attributes["num_heads"].as_int()
    if projection is None or shape is None or shape[2] != count or not isinstance(shape[3], int):
        return
    size = shape[3] // 3
    order = np.arange(count * 3 * size).reshape(count, 3, size).swapaxes(0, 1).ravel()
    arrays = [
        array_of(value).take(order, axis) for value, axis in zip(projection.tensors, projection.axes, strict=True)
    ]
    set_packed(node, projected(model, projection, arrays))
