"""What several passes ask of a graph: who made a value, what a constant holds, how slices lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

_ATTENTION = "GroupQueryAttention"
TO_HEADS_FIRST = [0, 2, 1, 3]
"""Axes of a transpose between [batch, sequence, heads, head_dim] and [batch, heads, sequence, head_dim]."""


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The attention operators of a graph, in its order."""
    return [node for node in model.graph if node.op_type == _ATTENTION]


def made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that makes a value, where it is one of this kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def swaps_heads(node: ir.Node) -> bool:
    """Whether a node is the transpose of `TO_HEADS_FIRST`."""
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == TO_HEADS_FIRST


def are_all_of_one(slices: Sequence[ir.Node]) -> bool:
    """Whether slices of one tensor's last axis leave nothing out between its beginning and its end."""
    source = slices[0].inputs[0]
    if source is None or source.shape is None or any(node.op_type != "Slice" for node in slices):
        return False
    bounds = [_bounds(node) for node in slices]
    size, end = source.shape[-1], 0
    for bound in bounds:
        if bound is None or bound[0] != end or bound[2:] not in ((len(source.shape) - 1, 1), (-1, 1)):
            return False
        end = bound[1]
    return isinstance(size, int) and end >= size


def _bounds(node: ir.Node) -> tuple[int, ...] | None:
    """A slice's start, end, axis and step, where it has one axis and they are constants."""
    constants = [value.const_value for value in node.inputs[1:] if value is not None]
    arrays = [constant.numpy() for constant in constants if constant is not None]
    if len(arrays) < 4 or any(array.size != 1 for array in arrays):
        return None
    return tuple(int(array.item()) for array in arrays)


def set_packed(node: ir.Node, packed: ir.Value | None) -> None:
    """Let attention take queries, keys and values as one tensor."""
    for index, value in enumerate((packed, None, None)):
        node.replace_input_with(index, value)


def array_of(value: ir.Value | None) -> np.ndarray:
    """What a constant holds."""
    assert value is not None
    assert value.const_value is not None
    array: np.ndarray = value.const_value.numpy()
    return array


def new_name(model: ir.Model, name: str) -> str:
    """A name that no constant has: layers whose biases are equal share one, by one name."""
    taken = sum(known.startswith(name) for known in model.graph.initializers)
    return f"{name}.{taken}" if taken else name


def initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A new constant of a graph."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    model.graph.register_initializer(value)
    return value
