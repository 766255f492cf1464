"""A factor of queries, which attention applies itself."""

from __future__ import annotations

import onnx_ir as ir


def absorb_scale(node: ir.Node) -> None:
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
