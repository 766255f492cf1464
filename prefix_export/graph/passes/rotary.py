"""Rotary positions, which attention applies itself, from tables of the graph's own angles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from prefix_runtime.bundle.graph_contract import POSITION_IDS, SEQUENCE

from .nodes import TO_HEADS_FIRST, are_all_of_one, initializer, made_by, swaps_heads


def rotate_in_attention(
    model: ir.Model,
    node: ir.Node,
    positions: int,
    tables: dict[tuple[str | None, ...], tuple[ir.Value, ir.Value]],
) -> None:
    """Queries and keys that are rotated by the same angles just before attention: it rotates them itself."""
    query, key = (_rotation(value) for value in node.inputs[:2])
    if query is None or key is None or query.angles != key.angles or not _can_rotate(node, query):
        return
    name = tuple(value.name for value in query.angles)
    if name not in tables:
        tables[name] = _tables(model, query.angles, positions)
    for index, rotation in enumerate((query, key)):
        node.replace_input_with(index, _packed_heads(model, node, rotation.source))
    position_ids = next(value for value in model.graph.inputs if value.name == POSITION_IDS)
    node.resize_inputs(max(10, len(node.inputs)))
    for index, value in zip((7, 8, 9), (*tables[name], position_ids), strict=True):
        node.replace_input_with(index, value)
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


def _can_rotate(attention: ir.Node, rotation: _Rotation) -> bool:
    """Whether onnxruntime's operator takes these positions (1.32: heads and what is rotated in multiples of 16)."""
    past, angles = attention.inputs[3], rotation.angles[0]
    sizes = [value.shape[-1] for value in (past, angles) if value is not None and value.shape is not None]
    return len(sizes) == 2 and all(isinstance(size, int) and size % 16 == 0 for size in sizes)


@dataclass(frozen=True)
class _Rotation:
    """What is rotated, [batch, heads, sequence, head_dim], in all of its last axis or the first part; and by what."""

    source: ir.Value
    angles: tuple[ir.Value, ...]


def _rotation(value: ir.Value | None) -> _Rotation | None:
    """The rotary embedding, fused by onnxscript's rule, whose result reaches attention as it is."""
    reshape = made_by(value, "Reshape")
    transpose = made_by(reshape.inputs[0], "Transpose") if reshape is not None else None
    if transpose is None or not swaps_heads(transpose):
        return None
    rotated = transpose.inputs[0]
    whole, joined = made_by(rotated, "RotaryEmbedding"), made_by(rotated, "Concat")
    if whole is not None:
        return _rotated(whole, whole.inputs[0])
    if joined is None or len(joined.inputs) != 2:
        return None
    first = made_by(joined.inputs[0], "RotaryEmbedding")
    parts = [made_by(first.inputs[0], "Slice") if first is not None else None, made_by(joined.inputs[1], "Slice")]
    slices = [part for part in parts if part is not None]
    if first is None or len(slices) < 2 or slices[0].inputs[0] is not slices[1].inputs[0] or not are_all_of_one(slices):
        return None
    return _rotated(first, slices[0].inputs[0])


def _rotated(embedding: ir.Node, source: ir.Value | None) -> _Rotation | None:
    angles = tuple(value for value in embedding.inputs[1:3] if value is not None)
    return _Rotation(source, angles) if source is not None and len(angles) == 2 else None


def _packed_heads(model: ir.Model, attention: ir.Node, heads_first: ir.Value) -> ir.Value:
    """[batch, heads, sequence, head_dim] as [batch, sequence, heads * head_dim]."""
    transpose = made_by(heads_first, "Transpose")
    heads = transpose.inputs[0] if transpose is not None and swaps_heads(transpose) else None
    if heads is None:
        swapped = ir.node("Transpose", [heads_first], {"perm": TO_HEADS_FIRST})
        model.graph.insert_before(attention, swapped)
        heads = swapped.outputs[0]
    reshape = made_by(heads, "Reshape")
    source = reshape.inputs[0] if reshape is not None else None
    if source is not None and source.shape is not None and len(source.shape) == 3:
        return source
    shape = initializer(model, f"{heads_first.name}.packed_shape", np.array([0, 0, -1], np.int64))
    packed = ir.node("Reshape", [heads, shape])
    model.graph.insert_before(attention, packed)
    return packed.outputs[0]


def _tables(model: ir.Model, angles: Sequence[ir.Value], positions: int) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines [positions, head_dim / 2] float32, by the graph's own computation from `position_ids`."""
    # Some versions of torch read the batch's size off another input: all are there.
    feeds = {str(value.name): _example(value, positions) for value in model.graph.inputs}
    feeds[POSITION_IDS] = np.arange(positions, dtype=np.int64)[None]
    part = ir.convenience.extract(model.graph, list(feeds), list(angles))
    computation = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=model.ir_version)))
    tables = [np.asarray(array) for array in computation.run(None, feeds)]
    halves = [np.ascontiguousarray(array.reshape(positions, -1)[:, : array.shape[-1] // 2]) for array in tables]
    names = [f"{value.name}.table" for value in angles]
    cosines, sines = (initializer(model, name, half) for name, half in zip(names, halves, strict=True))
    return cosines, sines


def _example(value: ir.Value, positions: int) -> np.ndarray:
    """Zeros for an input, of one row and so many tokens."""
    assert value.shape is not None
    assert value.dtype is not None
    names = [axis.value if isinstance(axis, ir.SymbolicDim) else axis for axis in value.shape]
    shape = [axis if isinstance(axis, int) else positions if axis == SEQUENCE else 1 for axis in names]
    return np.zeros(shape, value.dtype.numpy())
