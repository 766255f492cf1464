"""Put several nodes of a graph into one that a CUDA kernel runs.

Norms take the sum before them, and the bias of the projection before that; activations take their bias. Statistics
stay in float32, inside of the operators. The rules are onnxscript's, where it has them (0.7).
"""

from __future__ import annotations

from typing import Any, cast

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.rewriter import pattern
from onnxscript.rewriter.ort_fusions.bias_gelu import fuse_bias_gelu
from onnxscript.rewriter.ort_fusions.rms_normalization import RmsNormFusion
from onnxscript.rewriter.ort_fusions.skip_normalization import (
    fuse_skip_layer_normalization,
    fuse_skip_rms_normalization,
)

_ORT = "com.microsoft"


def fuse(model: ir.Model) -> None:
    """Fuse what a graph computes between its projections, in place."""
    _RULES.apply_to_model(model)
    fuse_skip_layer_normalization(model)
    fuse_skip_rms_normalization(model)
    fuse_bias_gelu(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.TopologicalSortPass()(model)
    _leave_out_unused(model.graph)


def _leave_out_unused(graph: ir.Graph) -> None:
    """Ask for no outputs that nothing reads: means and deviations of norms."""
    for node in graph:
        for output in node.outputs[1:]:
            if not output.uses() and not output.is_graph_output():
                output.name = ""


class _NormOfSum(RmsNormFusion):
    """onnxscript's rule, for norms of a sum alone: what it makes is none of ONNX' operators unless it is fused on."""

    def check(self, op: Any, x: ir.Value, *values: Any, **named: Any) -> Any:
        scale, producer = named["scale"], x.producer()
        if producer is None or producer.op_type != "Add" or scale.dtype != x.dtype:
            return pattern.MatchResult().fail("no sum, or multiplied in another type", x)
        return super().check(op, x, *values, **named)


class _RoundBeforeScale(pattern.RewriteRuleClassBase):
    """A product with a constant in float32 that is rounded (Gemma's norms) becomes one of what is rounded before.

    As the operators for norms multiply in the type of their outputs.
    """

    def pattern(self, op: Any, x: Any, scale: Any) -> Any:
        return op.Cast(op.Mul(x, scale), _outputs=["rounded"])

    def check(self, op: Any, scale: ir.Value, rounded: ir.Value, **_: Any) -> Any:  # noqa: ARG002  # onnxscript calls it so
        found = pattern.MatchResult()
        constant = scale.const_value
        if constant is None or len(constant.shape) != 1 or rounded.dtype not in _HALVES:
            return found.fail("no weight of a norm", scale)
        return found

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, rounded: ir.Value) -> ir.Value:
        assert rounded.dtype is not None
        return cast(ir.Value, op.Mul(op.Cast(x, to=rounded.dtype.value), _in_type_of(rounded, scale)))


_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _in_type_of(value: ir.Value, constant: ir.Value) -> ir.Value:
    """A constant in a value's type, made once."""
    producer, given = value.producer(), constant.const_value
    assert producer is not None
    assert producer.graph is not None
    assert value.dtype is not None
    assert given is not None
    initializers, name = producer.graph.initializers, f"{constant.name}.rounded"
    if name not in initializers:
        tensor = ir.tensor(given.numpy().astype(value.dtype.numpy()), name=name)
        initializers[name] = ir.Value(
            name=name, shape=ir.Shape(given.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return initializers[name]


class _FastGelu(pattern.RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.Gelu(x, approximate="tanh")

    def rewrite(self, op: Any, x: ir.Value) -> ir.Value:
        return cast(ir.Value, op.FastGelu(x, _domain=_ORT))


class _FastGeluOfSum(pattern.RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any, bias: Any) -> Any:
        return op.Gelu(op.Add(x, bias), approximate="tanh")

    def check(self, op: Any, bias: ir.Value, **_: Any) -> Any:  # noqa: ARG002  # onnxscript calls it so
        found = pattern.MatchResult()
        return found if bias.shape is not None and len(bias.shape) == 1 else found.fail("more than one axis", bias)

    def rewrite(self, op: Any, x: ir.Value, bias: ir.Value) -> ir.Value:
        return cast(ir.Value, op.FastGelu(x, bias, _domain=_ORT))


class _Silu(pattern.RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))

    def rewrite(self, op: Any, x: ir.Value) -> ir.Value:
        return cast(ir.Value, op.QuickGelu(x, alpha=1.0, _domain=_ORT))


_RULES = pattern.RewriteRuleSet(
    [
        _RoundBeforeScale.rule(),
        *(_NormOfSum.rule(f"norm of a sum, {order}", order) for order in (False, True)),
        _FastGeluOfSum.rule(),
        _FastGelu.rule(),
        _Silu.rule(),
    ]
)
