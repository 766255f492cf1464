"""Rounded products of one activation as one, for TensorRT alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from .nodes import array_of, initializer, made_by, new_name


def join_rounded(model: ir.Model) -> None:
    """Make one product, which is parted, of those of one activation whose weights have a scale for each output.

    TensorRT for RTX (1.7) does so itself, and keeps the weights of what it joins in 16 bits.
    """
    by_activation: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and _has_output_scales(made_by(node.inputs[1], "DequantizeLinear")):
            assert node.inputs[0] is not None
            by_activation.setdefault(node.inputs[0], []).append(node)
    for products in by_activation.values():
        if len(products) > 1:
            _join(model, products)
    passes.RemoveUnusedNodesPass()(model)


def _has_output_scales(node: ir.Node | None) -> bool:
    return node is not None and "block_size" not in node.attributes and node.attributes["axis"].as_int() == 1


def _join(model: ir.Model, products: Sequence[ir.Node]) -> None:
    rounded = [node for product in products if (node := made_by(product.inputs[1], "DequantizeLinear")) is not None]
    values, scales = ([array_of(node.inputs[index]) for node in rounded] for index in range(2))
    name = new_name(model, f"{products[0].name}.joined")
    constants = [
        initializer(model, name, np.concatenate(values, 1)),
        initializer(model, f"{name}.scales", np.concatenate(scales)),
        initializer(model, f"{name}.sizes", np.array([array.shape[1] for array in values], np.int64)),
    ]
    weight = ir.node("DequantizeLinear", constants[:2], attributes={"axis": 1})
    product = ir.node("MatMul", [products[0].inputs[0], weight.outputs[0]])
    split = ir.node("Split", [product.outputs[0], constants[2]], attributes={"axis": -1}, num_outputs=len(products))
    model.graph.insert_before(products[0], [weight, product, split])
    for before, after in zip(products, split.outputs, strict=True):
        after.type, after.shape = before.outputs[0].type, before.outputs[0].shape
        ir.convenience.replace_all_uses_with(before.outputs[0], after)
