"""Take out of a traced graph what costs time in each decode step and computes nothing: the passes, in their order.

onnxruntime fuses activations and norms itself when it opens a graph. What it leaves is done here: reshapes that change
nothing around attention; queries, keys and values that attention takes as one packed tensor, from one projection; a
factor of queries, and rotary positions, which attention applies itself.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.rewriter.ort_fusions.rotary_embedding import fuse_rotary_embedding

from .absorb_scale import absorb_scale
from .drop_reshapes import drop_reshapes
from .nodes import attention_nodes
from .pack_interleaved import pack_interleaved
from .pack_projections import pack_projections
from .pack_split import pack_split
from .rotary import rotate_in_attention


def simplify(model: ir.Model, positions: int) -> None:
    """Simplify a graph with the graph contract in place.

    Args:
        model: as torch exported it, with symbolic shapes on its values.
        positions: that the model has, for tables of rotary positions.
    """
    drop_reshapes(model.graph)
    fuse_rotary_embedding(model)
    tables: dict[tuple[str | None, ...], tuple[ir.Value, ir.Value]] = {}
    for node in attention_nodes(model):
        rotate_in_attention(model, node, positions, tables)
    passes.InlinePass()(model)  # rotary embeddings that attention cannot apply become what they were
    for node in attention_nodes(model):
        absorb_scale(node)
        pack_split(node)
        pack_interleaved(model, node)
        pack_projections(model, node)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.TopologicalSortPass()(model)
