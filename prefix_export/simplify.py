"""Take out of a traced graph what costs time in each decode step and computes nothing.

onnxruntime fuses activations and norms itself when it opens a graph. What it leaves is done here: reshapes that change
nothing around attention; queries, keys and values that attention takes as one packed tensor, from
one projection; rotary positions, which attention applies itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx.reference import ReferenceEvaluator
from onnxscript.rewriter.ort_fusions.rotary_embedding import fuse_rotary_embedding

_ATTENTION = "GroupQueryAttention"
_TO_HEADS_FIRST = [0, 2, 1, 3]
# The operators of a linear layer, with the axis of its outputs in their constants.
_PRODUCTS = {"MatMul": 1, "FusedMatMul": 0, "MatMulNBits": 0}


def simplify(model: ir.Model, positions: int) -> None:
    """Simplify a graph with the contract of `graph.py` in place.

    Args:
        model: as torch exported it, with symbolic shapes on its values.
        positions: that the model has, for tables of rotary positions.
    """
    _drop_reshapes(model.graph)
    fuse_rotary_embedding(model)
    tables: dict[tuple[str | None, ...], tuple[ir.Value, ir.Value]] = {}
    for node in _attention(model):
        _apply_rotary_in_attention(model, node, positions, tables)
    passes.InlinePass()(model)  # rotary embeddings that attention cannot apply become what they were
    for node in _attention(model):
        _absorb_scale(node)
        _pack_split(node)
        _pack_projections(model, node)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.TopologicalSortPass()(model)


def _attention(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == _ATTENTION]


def _drop_reshapes(graph: ir.Graph) -> None:
    """Read around reshapes, and chains of them, that end in the shape they began with."""
    for node in graph:
        if node.op_type != "Reshape":
            continue
        output, source = node.outputs[0], node.inputs[0]
        while source is not None:
            if _same_shape(source, output):
                ir.convenience.replace_all_uses_with(output, source)
                break
            before = source.producer()
            source = before.inputs[0] if before is not None and before.op_type == "Reshape" else None


def _same_shape(left: ir.Value, right: ir.Value) -> bool:
    if left.shape is None or right.shape is None or len(left.shape) != len(right.shape):
        return False
    pairs = [(_size(a), _size(b)) for a, b in zip(left.shape, right.shape, strict=True)]
    return all(a is not None and a == b for a, b in pairs)


def _size(axis: int | ir.SymbolicDim) -> int | str | None:
    return axis.value if isinstance(axis, ir.SymbolicDim) else axis


def _absorb_scale(node: ir.Node) -> None:
    """A query that is multiplied with a number: attention multiplies its products with it."""
    query = node.inputs[0]
    product = query.producer() if query is not None else None
    if (
        product is None
        or product.op_type != "Mul"
        or product.inputs[1] is None
        or product.inputs[1].const_value is None
    ):
        return
    factor = product.inputs[1].const_value.numpy()
    if factor.size == 1:
        scale = node.attributes["scale"].as_float() * float(factor.item())
        node.attributes["scale"] = ir.AttrFloat32("scale", scale)
        node.replace_input_with(0, product.inputs[0])


def _pack_split(node: ir.Node) -> None:
    """Query, key and value that are cut out of one tensor, one behind the other: attention takes the tensor."""
    parts = [value.producer() for value in node.inputs[:3] if value is not None]
    first = parts[0] if parts else None
    if first is None or len(parts) < 3 or any(part is None or part.inputs[0] is not first.inputs[0] for part in parts):
        return
    is_split = first.op_type == "Split" and list(first.outputs) == list(node.inputs[:3])
    if is_split or _are_all_of_one([part for part in parts if part is not None]):
        _set_packed(node, first.inputs[0])


def _are_all_of_one(slices: Sequence[ir.Node]) -> bool:
    """Whether slices of one tensor's last axis leave nothing out between its beginning and its end."""
    source = slices[0].inputs[0]
    if source is None or source.shape is None or any(node.op_type != "Slice" for node in slices):
        return False
    bounds = [_bounds(node) for node in slices]
    size, end = source.shape[-1], 0
    for found in bounds:
        if found is None or found[0] != end or found[2:] not in ((len(source.shape) - 1, 1), (-1, 1)):
            return False
        end = found[1]
    return isinstance(size, int) and end >= size


def _bounds(node: ir.Node) -> tuple[int, ...] | None:
    """A slice's start, end, axis and step, where it has one axis and they are constants."""
    constants = [value.const_value for value in node.inputs[1:] if value is not None]
    found = [constant.numpy() for constant in constants if constant is not None]
    if len(found) < 4 or any(array.size != 1 for array in found):
        return None
    return tuple(int(array.item()) for array in found)


def _set_packed(node: ir.Node, packed: ir.Value | None) -> None:
    for index, value in enumerate((packed, None, None)):
        node.replace_input_with(index, value)


@dataclass(frozen=True)
class _Projection:
    """A linear layer.

    Attributes:
        node: that multiplies.
        constants: its weights, as one or several tensors.
        axes: of the layer's outputs in each of them.
        bias: that is added, by a node of its own, or None.
    """

    node: ir.Node
    constants: tuple[ir.Value, ...]
    axes: tuple[int, ...]
    bias: ir.Value | None = None


def _pack_projections(model: ir.Model, node: ir.Node) -> None:
    """Query, key and value that three projections make of one activation: one makes them packed."""
    found = [_projection(value) for value in node.inputs[:3]]
    projections = [projection for projection in found if projection is not None]
    if len(projections) < 3 or not _alike(projections):
        return
    first = projections[0]
    merged = [
        _concatenated(model, [projection.constants[index] for projection in projections], axis)
        for index, axis in enumerate(first.axes)
    ]
    replaced = dict(zip(first.constants, merged, strict=True))
    attributes = dict(first.node.attributes)
    if "N" in attributes:
        outputs = sum(projection.node.attributes["N"].as_int() for projection in projections)
        attributes["N"] = ir.AttrInt64("N", outputs)
    packed = ir.Node(
        first.node.domain,
        first.node.op_type,
        [replaced.get(value, value) if value is not None else None for value in first.node.inputs],
        attributes=attributes.values(),
    )
    packed.outputs[0].type = first.node.outputs[0].type
    model.graph.insert_before(first.node, packed)
    output = packed.outputs[0]
    biases = [projection.bias for projection in projections if projection.bias is not None]
    if biases:
        added = ir.node("Add", [output, _concatenated(model, biases, 0)])
        added.outputs[0].type = output.type
        model.graph.insert_after(packed, added)
        output = added.outputs[0]
    _set_packed(node, output)


def _projection(value: ir.Value | None) -> _Projection | None:
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "Add":
        inner, bias = _projection(node.inputs[0]), node.inputs[1]
        is_bias = bias is not None and bias.const_value is not None and bias.const_value.shape.rank() == 1
        return replace(inner, bias=bias) if inner is not None and inner.bias is None and is_bias else None
    if node.op_type not in _PRODUCTS:
        return None
    constants = tuple(value for value in node.inputs[1:] if value is not None)
    if any(value.const_value is None or len(value.uses()) > 1 for value in constants):
        return None
    return _Projection(node, constants, (_PRODUCTS[node.op_type],) * len(constants))


def _alike(projections: Sequence[_Projection]) -> bool:
    def kind(projection: _Projection) -> tuple[object, ...]:
        node = projection.node
        given = tuple(value is not None for value in (*node.inputs, projection.bias))
        settings = {name: attribute.value for name, attribute in node.attributes.items() if name != "N"}
        return node.op_type, node.inputs[0], given, sorted(settings.items())

    return all(kind(projection) == kind(projections[0]) for projection in projections)


def _concatenated(model: ir.Model, values: Sequence[ir.Value], axis: int) -> ir.Value:
    arrays = [value.const_value.numpy() for value in values if value.const_value is not None]
    # Layers whose biases are equal share one, by one name.
    name = f"{values[0].name}.packed"
    taken = sum(known.startswith(name) for known in model.graph.initializers)
    return _initializer(model, f"{name}.{taken}" if taken else name, np.concatenate(arrays, axis))


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    model.graph.register_initializer(value)
    return value


def _apply_rotary_in_attention(
    model: ir.Model,
    node: ir.Node,
    positions: int,
    tables: dict[tuple[str | None, ...], tuple[ir.Value, ir.Value]],
) -> None:
    """Queries and keys that are rotated in full, by the same angles, just before attention: it rotates them itself."""
    rotations = [_rotation(value) for value in node.inputs[:2]]
    if rotations[0] is None or rotations[1] is None or not _can_rotate(node):
        return
    angles = rotations[0].inputs[1:3]
    if list(angles) != list(rotations[1].inputs[1:3]):
        return
    key = tuple(value.name for value in angles if value is not None)
    if key not in tables:
        tables[key] = _tables(model, angles, positions)
    for index, rotation in enumerate(rotations):
        node.replace_input_with(index, _before_rotation(model, node, rotation))
    position_ids = next(value for value in model.graph.inputs if value.name == "position_ids")
    node.resize_inputs(max(10, len(node.inputs)))
    for index, value in zip((7, 8, 9), (*tables[key], position_ids), strict=True):
        node.replace_input_with(index, value)
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


def _can_rotate(attention: ir.Node) -> bool:
    """Whether onnxruntime's operator takes rotary positions for this head size (1.32: a multiple of 16)."""
    past = attention.inputs[3]
    head_dim = past.shape[3] if past is not None and past.shape is not None else None
    return isinstance(head_dim, int) and head_dim % 16 == 0


def _rotation(value: ir.Value | None) -> ir.Node | None:
    """The rotary embedding, fused by onnxscript's rule, whose result reaches attention as it is."""
    reshape = value.producer() if value is not None else None
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is None:
        return None
    transpose = reshape.inputs[0].producer()
    if transpose is None or not _swaps_heads(transpose) or transpose.inputs[0] is None:
        return None
    rotation = transpose.inputs[0].producer()
    if rotation is None or rotation.op_type != "RotaryEmbedding" or rotation.inputs[0] is None:
        return None
    source = rotation.inputs[0].producer()
    return rotation if source is not None and _swaps_heads(source) else None


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == _TO_HEADS_FIRST


def _before_rotation(model: ir.Model, attention: ir.Node, rotation: ir.Node | None) -> ir.Value:
    """What is rotated, as [batch, sequence, heads * head_dim]."""
    assert rotation is not None
    assert rotation.inputs[0] is not None
    transpose = rotation.inputs[0].producer()
    assert transpose is not None
    heads = transpose.inputs[0]  # [batch, sequence, heads, head_dim]
    assert heads is not None
    reshape = heads.producer()
    if reshape is not None and reshape.op_type == "Reshape" and reshape.inputs[0] is not None:
        source = reshape.inputs[0]
        if source.shape is not None and len(source.shape) == 3:
            return source
    shape = _initializer(model, f"{heads.name}.packed_shape", np.array([0, 0, -1], np.int64))
    packed = ir.node("Reshape", [heads, shape])
    model.graph.insert_before(attention, packed)
    return packed.outputs[0]


def _tables(model: ir.Model, angles: Sequence[ir.Value | None], positions: int) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines [positions, head_dim / 2] float32, by the graph's own computation from `position_ids`."""
    # Some versions of torch read the batch's size off another input: all are there.
    feeds = {str(value.name): _example(value, positions) for value in model.graph.inputs}
    feeds["position_ids"] = np.arange(positions, dtype=np.int64)[None]
    part = ir.convenience.extract(model.graph, list(feeds), [value for value in angles if value is not None])
    computation = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=model.ir_version)))
    found = [np.asarray(array) for array in computation.run(None, feeds)]
    halves = [np.ascontiguousarray(array.reshape(positions, -1)[:, : array.shape[-1] // 2]) for array in found]
    names = [f"{value.name}.table" for value in angles if value is not None]
    cosines, sines = (_initializer(model, name, half) for name, half in zip(names, halves, strict=True))
    return cosines, sines


def _example(value: ir.Value, positions: int) -> np.ndarray:
    """Zeros for an input, of one row and so many tokens."""
    assert value.shape is not None
    assert value.dtype is not None
    names = [axis.value if isinstance(axis, ir.SymbolicDim) else axis for axis in value.shape]
    shape = [axis if isinstance(axis, int) else positions if axis == "sequence_length" else 1 for axis in names]
    return np.zeros(shape, value.dtype.numpy())
