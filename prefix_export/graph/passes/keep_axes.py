"""Rows in the two axes that they come in, where a reshape joins these and others part them again."""

from __future__ import annotations

import onnx_ir as ir

# What computes each row of its first input by itself, whatever axes there are before the last.
_BY_ROW = frozenset({"FusedMatMul", "Gelu", "LayerNormalization", "MatMul", "MatMulNBits", "Relu", "Sigmoid", "Tanh"})
_ELEMENTWISE = frozenset({"Add", "Mul"})


def keep_axes(graph: ir.Graph, joined: ir.Node) -> None:
    """Compute rows in the two axes that they come in, if a reshape joins these and others part them again (OPT)."""
    source, rows = joined.inputs[0], joined.outputs[0]
    apart, together = (source.shape if source is not None else None), rows.shape
    if apart is None or together is None or len(apart) != 3 or len(together) != 2 or apart[2] != together[1]:
        return
    inside, parted = {rows}, []
    for node in graph:
        if node is joined or not inside.intersection(node.inputs):
            continue
        shape = node.outputs[0].shape
        if node.op_type == "Reshape" and shape is not None and len(shape) == 3 and list(shape[:2]) == list(apart[:2]):
            parted.append(node)
        elif _is_by_row(node, inside):
            inside.add(node.outputs[0])
        else:
            return
    if any(value.is_graph_output() for value in inside):
        return
    for value in inside:
        value.shape = ir.Shape([*apart[:2], value.shape[-1]]) if value.shape is not None else None
    for node in (joined, *parted):
        before = node.inputs[0]
        assert before is not None
        ir.convenience.replace_all_uses_with(node.outputs[0], before)


def _is_by_row(node: ir.Node, inside: set[ir.Value]) -> bool:
    """Whether each row of a node's output comes of the same row of what is inside, and of constants."""
    if node.op_type in _BY_ROW:
        return node.inputs[0] in inside and not inside.intersection(node.inputs[1:])
    others = [value for value in node.inputs if value not in inside]
    return node.op_type in _ELEMENTWISE and all(
        value is not None and value.shape is not None and len(value.shape) < 2 for value in others
    )
