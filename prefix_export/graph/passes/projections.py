"""Linear layers in a graph: read as a value, and made anew with other weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .nodes import initializer, new_name

# The operators of a linear layer, with the axis of its outputs in their constants.
_PRODUCTS = {"MatMul": 1, "FusedMatMul": 0, "MatMulNBits": 0}


@dataclass(frozen=True)
class Projection:
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


def projection_of(value: ir.Value | None) -> Projection | None:
    """The linear layer that makes a value; None where none does, or others share its constants."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "Add":
        inner, bias = projection_of(node.inputs[0]), node.inputs[1]
        is_bias = bias is not None and bias.const_value is not None and bias.const_value.shape.rank() == 1
        return replace(inner, bias=bias) if inner is not None and inner.bias is None and is_bias else None
    if node.op_type not in _PRODUCTS:
        return None
    constants = tuple(value for value in node.inputs[1:] if value is not None)
    if any(value.const_value is None or len(value.uses()) > 1 for value in constants):
        return None
    return Projection(node, constants, _PRODUCTS[node.op_type])


def projected(model: ir.Model, like: Projection, tensors: Sequence[np.ndarray]) -> ir.Value:
    """What a linear layer like another, of other weights and another bias, makes of the same activation."""
    names = [new_name(model, f"{value.name}.packed") for value in like.tensors]
    values = [initializer(model, name, array) for name, array in zip(names, tensors, strict=True)]
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
