"""Take out of a graph what torch's exporter leaves and nothing needs, such as casts and transposes of no effect.

onnxscript's own `optimize` does the same and more. It took longer than tracing, most of it in one rule that looks at
every pair of slices. `simplify` reads slices as they are.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

_RULES = (
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.reshape_reshape_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
)


def clean(model: ir.Model) -> None:
    """Clean a graph in place, as `torch.onnx.export(optimize=False)` makes it."""
    # Shapes are inferred in the second round alone, when a third of the nodes is left.
    for infers_shapes in (False, True):
        optimizer.fold_constants(model, onnx_shape_inference=infers_shapes)
        for step in (
            RewritePass(_RULES),
            passes.RemoveUnusedNodesPass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.DeduplicateInitializersPass(),
            passes.CommonSubexpressionEliminationPass(),
        ):
            step(model)
    for last in (
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        last(model)
