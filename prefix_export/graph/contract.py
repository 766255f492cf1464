"""Whether a graph that was exported keeps its contract: its names and axes, and the operators of its flavour.

What the contract says stands in `prefix_runtime.bundle.graph_contract`, whose names are the only ones.
"""

from __future__ import annotations

import onnx_ir as ir

from prefix_export.errors import ExportError
from prefix_runtime.bundle.graph_contract import TOKEN_INPUTS


def check_attention(graph: ir.Model, layers: int) -> None:
    """Refuse a graph of the fast flavour that has not one attention operator for each layer.

    Raises:
        ExportError
    """
    operators = sum(node.op_type == "GroupQueryAttention" for node in graph.graph)
    if operators != layers:
        raise ExportError(f"graph: expected {layers} GroupQueryAttention nodes, found {operators}")


def check_operators(graph: ir.Model) -> None:
    """Refuse a graph of the portable flavour that has other operators than ONNX' own.

    Raises:
        ExportError
    """
    others = sorted({f"{node.domain}::{node.op_type}" for node in graph.graph if node.domain})
    if others:
        raise ExportError(f"graph: expected standard operators alone, found {', '.join(others)}")


def check_axes(graph: ir.Model) -> None:
    """Refuse a graph whose inputs have other axes than the contract names.

    Raises:
        ExportError
    """
    for name, axes in TOKEN_INPUTS.items():
        value = next((value for value in graph.graph.inputs if value.name == name), None)
        shape = ", ".join(axes)
        actual = (
            ", ".join(str(size) for size in value.shape) if value is not None and value.shape is not None else "none"
        )
        if actual != shape:
            raise ExportError(f"graph: input {name}: expected axes [{shape}], found [{actual}]")
