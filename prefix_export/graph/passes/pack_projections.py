"""Queries, keys and values from one projection, which attention takes as one packed tensor.

onnxscript's rules for packed projections know neither rounded weights nor this operator's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .nodes import array_of, set_packed
from .projections import Projection, projected, projection_of


def pack_projections(model: ir.Model, node: ir.Node) -> None:
    """Query, key and value that three projections make of one activation: one makes them packed."""
    three = [projection_of(value) for value in node.inputs[:3]]
    projections = [projection for projection in three if projection is not None]
    if len(projections) < 3 or not _alike(projections):
        return
    tensors = zip(*(projection.tensors for projection in projections), strict=True)
    packed = [
        np.concatenate([array_of(value) for value in parts], axis)
        for parts, axis in zip(tensors, projections[0].axes, strict=True)
    ]
    set_packed(node, projected(model, projections[0], packed))


def _alike(projections: Sequence[Projection]) -> bool:
    def kind(projection: Projection) -> tuple[object, ...]:
        node = projection.node
        given = tuple(value is not None for value in (*node.inputs, projection.bias))
        settings = {name: attribute.value for name, attribute in node.attributes.items() if name != "N"}
        return node.op_type, node.inputs[0], given, sorted(settings.items())

    return all(kind(projection) == kind(projections[0]) for projection in projections)
