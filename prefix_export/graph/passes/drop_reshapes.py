"""Read around reshapes that change nothing around attention."""

from __future__ import annotations

import onnx_ir as ir


def drop_reshapes(graph: ir.Graph) -> None:
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
