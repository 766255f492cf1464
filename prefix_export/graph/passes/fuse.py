"""Put several nodes of a graph into one that a CUDA kernel runs.

Norms take the sum before them, and the bias of the projection before that; activations take their bias. Statistics
stay in float32, inside of the operators. The rules are onnxscript's, where it has them (0.7).
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.rewriter import pattern
from onnxscript.rewriter.ort_fusions.bias_gelu import fuse_bias_gelu
from onnxscript.rewriter.ort_fusions.rms_normalization import RmsNormFusion
from onnxscript.rewriter.ort_fusions.skip_normalization import (
    fuse_skip_layer_normalization,
    fuse_skip_rms_normalization,
)

from .keep_axes import keep_axes

_ORT = "com.microsoft"


def fuse(model: ir.Model) -> None:
    """Fuse what a graph computes between its projections, in place."""
    for node in [node for node in model.graph if node.op_type == "Reshape"]:
        keep_axes(model.graph, node)
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
        result = pattern.MatchResult()
        constant = scale.const_value
        if constant is None or len(constant.shape) != 1 or rounded.dtype not in _HALVES:
            return result.fail("no weight of a norm", scale)
        return result

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, rounded: ir.Value) -> ir.Value:
        assert rounded.dtype is not None
        return cast(ir.Value, op.Mul(op.Cast(x, to=rounded.dtype.value), _in_type_of(rounded, scale)))


_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _in_type_of(value: ir.Value, constant: ir.Value) -> ir.Value:
    """A constant in a value's type."""
    given = constant.const_value
    assert value.dtype is not None
    assert given is not None
    return _constant(value, f"{constant.name}.rounded", given.numpy().astype(value.dtype.numpy()))


def _constant(beside: ir.Value, name: str, array: np.ndarray) -> ir.Value:
    """A constant in the graph that computes a value, made once for a name."""
    producer = beside.producer()
    assert producer is not None
    assert producer.graph is not None
    initializers = producer.graph.initializers
    if name not in initializers:
        tensor = ir.tensor(array, name=name)
        shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        initializers[name] = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    return initializers[name]


class _BiasesOfSum(pattern.RewriteRuleClassBase):
    """Two projections that are added, each with its bias (GPT-NeoX): one bias, for the norm behind to take."""

    def pattern(self, op: Any, x: Any, y: Any, first: Any, second: Any) -> Any:
        return op.Add(op.Add(x, first), op.Add(y, second))

    def check(self, op: Any, first: ir.Value, second: ir.Value, **_: Any) -> Any:  # noqa: ARG002  # as above
        result = pattern.MatchResult()
        constants = [value.const_value for value in (first, second)]
        is_bias = [constant is not None and len(constant.shape) == 1 for constant in constants]
        return result if all(is_bias) else result.fail("no biases", first)

    def rewrite(self, op: Any, x: ir.Value, y: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
        arrays = [value.const_value.numpy() for value in (first, second) if value.const_value is not None]
        total = arrays[0].astype(np.float32) + arrays[1].astype(np.float32)
        bias = _constant(x, f"{first.name}+{second.name}", total.astype(arrays[0].dtype))
        both = cast(ir.Value, op.Add(x, y))
        both.shape, both.type = x.shape, x.type  # which the rules for norms look at
        return cast(ir.Value, op.Add(both, bias))


class _FastGelu(pattern.RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.Gelu(x, approximate="tanh")

    def rewrite(self, op: Any, x: ir.Value) -> ir.Value:
        return cast(ir.Value, op.FastGelu(x, _domain=_ORT))


class _FastGeluOfSum(pattern.RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any, bias: Any) -> Any:
        return op.Gelu(op.Add(x, bias), approximate="tanh")

    def check(self, op: Any, bias: ir.Value, **_: Any) -> Any:  # noqa: ARG002  # onnxscript calls it so
        result = pattern.MatchResult()
        return result if bias.shape is not None and len(bias.shape) == 1 else result.fail("more than one axis", bias)

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
        _BiasesOfSum.rule(),
        *(_NormOfSum.rule(f"norm of a sum, {order}", order) for order in (False, True)),
        _FastGeluOfSum.rule(),
        _FastGelu.rule(),
        _Silu.rule(),
    ]
)
