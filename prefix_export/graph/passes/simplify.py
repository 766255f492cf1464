"""Take out of a traced graph what costs time in each decode step and computes nothing.

onnxruntime fuses activations and norms itself when it opens a graph. What it leaves is done here: reshapes that change
nothing around attention; queries, keys and values that attention takes as one packed tensor, from one projection; a
factor of queries, and rotary positions, which attention applies itself. onnxscript's rules for packed projections know
neither rounded weights nor this operator's inputs. `join_rounded` is for TensorRT alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx.reference import ReferenceEvaluator
from onnxscript.rewriter.ort_fusions.rotary_embedding import fuse_rotary_embedding

from prefix_runtime.bundle.graph_contract import POSITION_IDS, SEQUENCE

_ATTENTION = "GroupQueryAttention"
_TO_HEADS_FIRST = [0, 2, 1, 3]
# The operators of a linear layer, with the axis of its outputs in their constants.
_PRODUCTS = {"MatMul": 1, "FusedMatMul": 0, "MatMulNBits": 0}


def simplify(model: ir.Model, positions: int) -> None:
    """Simplify a graph with the graph contract in place.

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
        _pack_interleaved(model, node)
        _pack_projections(model, node)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.TopologicalSortPass()(model)


def join_rounded(model: ir.Model) -> None:
    """Make one product, which is parted, of those of one activation whose weights have a scale for each output.

    TensorRT for RTX (1.7) does so itself, and keeps the weights of what it joins in 16 bits.
    """
    by_activation: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and _has_output_scales(_made_by(node.inputs[1], "DequantizeLinear")):
            assert node.inputs[0] is not None
            by_activation.setdefault(node.inputs[0], []).append(node)
    for products in by_activation.values():
        if len(products) > 1:
            _join(model, products)
    passes.RemoveUnusedNodesPass()(model)


def _has_output_scales(node: ir.Node | None) -> bool:
    return node is not None and "block_size" not in node.attributes and node.attributes["axis"].as_int() == 1


def _join(model: ir.Model, products: Sequence[ir.Node]) -> None:
    rounded = [node for product in products if (node := _made_by(product.inputs[1], "DequantizeLinear")) is not None]
    values, scales = ([_array(node.inputs[index]) for node in rounded] for index in range(2))
    name = _new_name(model, f"{products[0].name}.joined")
    constants = [
        _initializer(model, name, np.concatenate(values, 1)),
        _initializer(model, f"{name}.scales", np.concatenate(scales)),
        _initializer(model, f"{name}.sizes", np.array([array.shape[1] for array in values], np.int64)),
    ]
    weight = ir.node("DequantizeLinear", constants[:2], attributes={"axis": 1})
    product = ir.node("MatMul", [products[0].inputs[0], weight.outputs[0]])
    split = ir.node("Split", [product.outputs[0], constants[2]], attributes={"axis": -1}, num_outputs=len(products))
    model.graph.insert_before(products[0], [weight, product, split])
    for before, after in zip(products, split.outputs, strict=True):
        after.type, after.shape = before.outputs[0].type, before.outputs[0].shape
        ir.convenience.replace_all_uses_with(before.outputs[0], after)


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
        weights: its constants, one or several.
        axis: of the layer's outputs in each of them.
        bias: that is added, by a node of its own, or None.
    """

    node: ir.Node
    weights: tuple[ir.Value, ...]
    axis: int
    bias: ir.Value | None = None

    @property
    def tensors(self) -> tuple[ir.Value, ...]:
        """All that is constant, the bias last."""
        return self.weights if self.bias is None else (*self.weights, self.bias)

    @property
    def axes(self) -> tuple[int, ...]:
        """Of the layer's outputs in each of the tensors."""
        return (self.axis,) * len(self.weights) + (0,) * (self.bias is not None)


def _pack_projections(model: ir.Model, node: ir.Node) -> None:
    """Query, key and value that three projections make of one activation: one makes them packed."""
    found = [_projection(value) for value in node.inputs[:3]]
    projections = [projection for projection in found if projection is not None]
    if len(projections) < 3 or not _alike(projections):
        return
    tensors = zip(*(projection.tensors for projection in projections), strict=True)
    packed = [
        np.concatenate([_array(value) for value in parts], axis)
        for parts, axis in zip(tensors, projections[0].axes, strict=True)
    ]
    _set_packed(node, _projected(model, projections[0], packed))


def _pack_interleaved(model: ir.Model, node: ir.Node) -> None:
    """Query, key and value of a head beside one another (GPT-NeoX): the projection makes those of all heads so."""
    parted = [_made_by(value, "Reshape") for value in node.inputs[:3]]
    swapped = [_made_by(part.inputs[0], "Transpose") for part in parted if part is not None]
    parts = [part.inputs[0] for part in swapped if part is not None and _swaps_heads(part)]
    split = _made_by(parts[0], "Split") if len(parts) == 3 else None
    if split is None or list(split.outputs) != parts:
        return
    transpose = _made_by(split.inputs[0], "Transpose")
    heads = _made_by(transpose.inputs[0], "Reshape") if transpose is not None and _swaps_heads(transpose) else None
    projection = _projection(heads.inputs[0]) if heads is not None else None
    shape = heads.outputs[0].shape if heads is not None else None
    count = node.attributes["num_heads"].as_int()
    if projection is None or shape is None or shape[2] != count or not isinstance(shape[3], int):
        return
    size = shape[3] // 3
    order = np.arange(count * 3 * size).reshape(count, 3, size).swapaxes(0, 1).ravel()
    arrays = [_array(value).take(order, axis) for value, axis in zip(projection.tensors, projection.axes, strict=True)]
    _set_packed(node, _projected(model, projection, arrays))


def _projected(model: ir.Model, like: _Projection, tensors: Sequence[np.ndarray]) -> ir.Value:
    """What a linear layer like another, of other weights and another bias, makes of the same activation."""
    names = [_new_name(model, f"{value.name}.packed") for value in like.tensors]
    values = [_initializer(model, name, array) for name, array in zip(names, tensors, strict=True)]
    replaced = dict(zip(like.weights, values, strict=False))
    attributes = dict(like.node.attributes)
    if "N" in attributes:
        attributes["N"] = ir.AttrInt64("N", tensors[0].shape[0])
    product = ir.Node(
        like.node.domain,
        like.node.op_type,
        [replaced.get(value, value) if value is not None else None for value in like.node.inputs],
        attributes=attributes.values(),
    )
    product.outputs[0].type = like.node.outputs[0].type
    model.graph.insert_before(like.node, product)
    if like.bias is None:
        return product.outputs[0]
    added = ir.node("Add", [product.outputs[0], values[-1]])
    added.outputs[0].type = product.outputs[0].type
    model.graph.insert_after(product, added)
    return added.outputs[0]


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
    return _Projection(node, constants, _PRODUCTS[node.op_type])


def _alike(projections: Sequence[_Projection]) -> bool:
    def kind(projection: _Projection) -> tuple[object, ...]:
        node = projection.node
        given = tuple(value is not None for value in (*node.inputs, projection.bias))
        settings = {name: attribute.value for name, attribute in node.attributes.items() if name != "N"}
        return node.op_type, node.inputs[0], given, sorted(settings.items())

    return all(kind(projection) == kind(projections[0]) for projection in projections)


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    array: np.ndarray = value.const_value.numpy()
    return array


def _new_name(model: ir.Model, name: str) -> str:
    """A name that no constant has: layers whose biases are equal share one, by one name."""
    taken = sum(known.startswith(name) for known in model.graph.initializers)
    return f"{name}.{taken}" if taken else name


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
    reshape = _made_by(value, "Reshape")
    transpose = _made_by(reshape.inputs[0], "Transpose") if reshape is not None else None
    if transpose is None or not _swaps_heads(transpose):
        return None
    rotated = transpose.inputs[0]
    whole, joined = _made_by(rotated, "RotaryEmbedding"), _made_by(rotated, "Concat")
    if whole is not None:
        return _rotated(whole, whole.inputs[0])
    if joined is None or len(joined.inputs) != 2:
        return None
    first = _made_by(joined.inputs[0], "RotaryEmbedding")
    parts = [_made_by(first.inputs[0], "Slice") if first is not None else None, _made_by(joined.inputs[1], "Slice")]
    slices = [part for part in parts if part is not None]
    if (
        first is None
        or len(slices) < 2
        or slices[0].inputs[0] is not slices[1].inputs[0]
        or not _are_all_of_one(slices)
    ):
        return None
    return _rotated(first, slices[0].inputs[0])


def _rotated(embedding: ir.Node, source: ir.Value | None) -> _Rotation | None:
    angles = tuple(value for value in embedding.inputs[1:3] if value is not None)
    return _Rotation(source, angles) if source is not None and len(angles) == 2 else None


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that makes a value, where it is one of this kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == _TO_HEADS_FIRST


def _packed_heads(model: ir.Model, attention: ir.Node, heads_first: ir.Value) -> ir.Value:
    """[batch, heads, sequence, head_dim] as [batch, sequence, heads * head_dim]."""
    transpose = _made_by(heads_first, "Transpose")
    heads = transpose.inputs[0] if transpose is not None and _swaps_heads(transpose) else None
    if heads is None:
        swapped = ir.node("Transpose", [heads_first], {"perm": _TO_HEADS_FIRST})
        model.graph.insert_before(attention, swapped)
        heads = swapped.outputs[0]
    reshape = _made_by(heads, "Reshape")
    source = reshape.inputs[0] if reshape is not None else None
    if source is not None and source.shape is not None and len(source.shape) == 3:
        return source
    shape = _initializer(model, f"{heads_first.name}.packed_shape", np.array([0, 0, -1], np.int64))
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
    found = [np.asarray(array) for array in computation.run(None, feeds)]
    halves = [np.ascontiguousarray(array.reshape(positions, -1)[:, : array.shape[-1] // 2]) for array in found]
    names = [f"{value.name}.table" for value in angles]
    cosines, sines = (_initializer(model, name, half) for name, half in zip(names, halves, strict=True))
    return cosines, sines


def _example(value: ir.Value, positions: int) -> np.ndarray:
    """Zeros for an input, of one row and so many tokens."""
    assert value.shape is not None
    assert value.dtype is not None
    names = [axis.value if isinstance(axis, ir.SymbolicDim) else axis for axis in value.shape]
    shape = [axis if isinstance(axis, int) else positions if axis == SEQUENCE else 1 for axis in names]
    return np.zeros(shape, value.dtype.numpy())
