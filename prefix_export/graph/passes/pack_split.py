"""Queries, keys and values that are cut out of one tensor, which attention takes as it is."""

from __future__ import annotations

import onnx_ir as ir

from .nodes import are_all_of_one, set_packed


def pack_split(node: ir.Node) -> None:
    """Query, key and value that are cut out of one tensor, one behind the other: attention takes the tensor."""
    parts = [value.producer() for value in node.inputs[:3] if value is not None]
    first = parts[0] if parts else None
    if first is None or len(parts) < 3 or any(part is None or part.inputs[0] is not first.inputs[0] for part in parts):
        return
    is_split = first.op_type == "Split" and list(first.outputs) == list(node.inputs[:3])
    if is_split or are_all_of_one([part for part in parts if part is not None]):
        set_packed(node, first.inputs[0])
