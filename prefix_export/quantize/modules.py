"""The weights of a model's linear layers in 8 or 4 bits: rounded in the model, packed in the graph.

The operator that multiplies with what is packed is onnxruntime's `com.microsoft::MatMulNBits`, or, in standard
operators, `DequantizeLinear` and `MatMul`. The model itself keeps the rounded weights in float32: the source framework
runs it as it is, and is what the graph is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefix_export.errors import ExportError
from prefix_export.progress import SILENT, Progress
from prefix_export.targets import Target

from .options import Quantization
from .rounding import PackedWeight, pack, unpacked

# Activations are rounded to 8 bits, block by block, which is what the fast kernels multiply.
_ACCURACY_LEVEL = 4


class QuantizedModel:
    """A model whose linear weights, the tied output projection's included, and embedding were rounded in place.

    Args:
        model: in float32; its weights are overwritten by what their quantised values stand for.
        settings: how they are rounded.
        progress: told of the layers that are quantized.

    Raises:
        ExportError: a weight is not finite, or too large for a scale.
    """

    def __init__(self, model: PreTrainedModel, settings: Quantization, progress: Progress = SILENT) -> None:
        self.settings = settings
        self._model = model
        self._packed: dict[str, PackedWeight] = {}
        done: dict[int, PackedWeight] = {}  # by parameter: tied ones are rounded once
        chosen = {name: module for name, module in model.named_modules() if _is_quantized(module, model, settings)}
        progress.phase("quantize", len(chosen), unit="layers")
        for name, module in chosen.items():
            weight: torch.nn.Parameter = module.weight
            if id(weight) not in done:
                done[id(weight)] = _round_in_place(weight, settings, transposed=isinstance(module, Conv1D))
                if not done[id(weight)].scales.isfinite().all():
                    raise ExportError(
                        f"{name}.weight: expected numbers that {settings.bits} bits and a scale can hold, found "
                        "some that are not finite or too large; take another --precision"
                    )
            self._packed[name] = done[id(weight)]
            progress.advance()

    @contextmanager
    def packed(self, target: Target) -> Iterator[None]:
        """Put modules that emit a target's operators in the place of linear layers and embedding, for the trace."""
        before = {name: self._model.get_submodule(name) for name in self._packed}
        if target.is_for_gpu and self.settings.method == "hqq":
            # The operator takes zero points in other places there (onnxruntime 1.31): looked up as it is.
            before = {name: module for name, module in before.items() if not isinstance(module, torch.nn.Embedding)}
        emitted = _GPU if target.is_for_gpu else _ONNXRUNTIMES if target.flavour == "fast" else _STANDARD
        if self.settings.block_size is None:
            emitted = _BY_OUTPUT
        shared: dict[int, torch.nn.Module] = {}
        try:
            for name, module in before.items():
                self._model.set_submodule(name, _emitting(module, self._packed[name], shared, emitted))
            yield
        finally:
            for name, module in before.items():
                self._model.set_submodule(name, module)


def _is_quantized(module: torch.nn.Module, model: PreTrainedModel, settings: Quantization) -> bool:
    # An embedding of a subclass computes something of its own; it stays as it is. TensorRT looks up no rounded table.
    is_embedding = module is model.get_input_embeddings() and type(module) is torch.nn.Embedding
    is_embedding = is_embedding and settings.block_size is not None
    return is_embedding or isinstance(module, torch.nn.Linear | Conv1D)


def _round_in_place(weight: torch.nn.Parameter, settings: Quantization, transposed: bool) -> PackedWeight:
    plain = (weight.detach().T if transposed else weight.detach()).float()
    packed = pack(plain.contiguous(), settings)
    rounded = packed.dequantized()
    weight.data.copy_(rounded.T if transposed else rounded)
    return packed


class _Packed(torch.nn.Module):
    """The tensors of a weight, as one module, so that layers that share a weight share its tensors in the graph."""

    values: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zero_points", weight.zero_points)


def _emitting(
    module: torch.nn.Module, weight: PackedWeight, shared: dict[int, torch.nn.Module], emitted: tuple[Any, Any, Any]
) -> torch.nn.Module:
    """A module that emits operators in the place of another; `emitted`: classes of weights, linears, embeddings."""
    weights, linear, embedding = emitted
    if id(weight) not in shared:
        shared[id(weight)] = weights(weight)
    kept_module: torch.nn.Module
    if isinstance(module, torch.nn.Embedding):
        kept_module = embedding(shared[id(weight)])
    else:
        kept_module = linear(shared[id(weight)], module.bias)
    return kept_module


class _QuantizedLinear(torch.nn.Module):
    """Emits `com.microsoft::MatMulNBits` (onnxruntime 1.32, docs/ContribOperators.md)."""

    _settings: Mapping[str, int] = MappingProxyType({"accuracy_level": _ACCURACY_LEVEL})

    def __init__(self, packed: _Packed, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        return self._product(activation, self.bias)

    def _product(self, activation: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, outputs = self.packed.weight, self.packed.values.shape[0]
        inputs = [activation, self.packed.values, self.packed.scales, self.packed.zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        output: torch.Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            inputs,
            attrs={
                "K": weight.inputs,
                "N": outputs,
                "bits": weight.settings.bits,
                "block_size": weight.block_size,
                **self._settings,
            },
            dtype=activation.dtype,
            shape=(*activation.shape[:-1], outputs),
            version=1,
        )
        return output


class _QuantizedEmbedding(torch.nn.Module):
    """Emits `com.microsoft::GatherBlockQuantized` on the very table that a tied output projection multiplies with."""

    zero_points: torch.Tensor | None

    def __init__(self, packed: _Packed) -> None:
        super().__init__()
        self.packed = packed
        self.register_buffer("zero_points", _bytes_of_zero_points(packed.weight))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[batch, sequence] int64 to [batch, sequence, inputs]."""
        weight = self.packed.weight
        blocks = weight.scales.shape[1]
        inputs = [self.packed.values, token_ids, self.packed.scales.unsqueeze(2)]
        if self.zero_points is not None:
            inputs.append(self.zero_points)
        attributes: dict[str, Any] = {
            "gather_axis": 0,
            "quantize_axis": 2,
            "block_size": weight.block_size,
            "bits": weight.settings.bits,
        }
        output: torch.Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            inputs,
            attrs=attributes,
            dtype=self.packed.scales.dtype,
            shape=(*token_ids.shape, blocks, weight.block_size),
            version=1,
        )
        output = output.flatten(2)
        return output if output.shape[2] == weight.inputs else output[..., : weight.inputs]


def _bytes_of_zero_points(weight: PackedWeight) -> torch.Tensor | None:
    """[vocab, blocks, 1] uint8: a byte each, as the operator takes them for blocks that have an axis of their own."""
    if weight.zero_points is None:
        return None
    zeros = unpacked(weight.zero_points, weight.settings.bits)
    return zeros[:, : weight.scales.shape[1], None].contiguous()


class _PackedForGpu(_Packed):
    """The same with scales of float16, and as many rows as onnxruntime's kernel for one row of activations takes.

    With a number of outputs that is no multiple of 8 it would widen the whole weight in every step (1.32).
    """

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__(weight)
        missing = -weight.outputs % 64 if weight.outputs % 8 else 0
        self.scales = self.scales.half()
        for name, tensor in list(self.named_buffers()):
            setattr(self, name, torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing)))


class _GpuLinear(_QuantizedLinear):
    """The same for CUDA, with the bias apart: the operator adds it in a kernel of its own, what follows for nothing."""

    _settings: Mapping[str, int] = MappingProxyType({})

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        output = self._product(activation, None)
        outputs = self.packed.weight.outputs
        output = output if output.shape[-1] == outputs else output[..., :outputs]
        return output if self.bias is None else output + self.bias


class _Rounded(torch.nn.Module):
    """A weight of 8 bits [inputs, outputs] with the scales of its blocks, for `DequantizeLinear`; shared."""

    values: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.attributes: Mapping[str, int] = {"axis": 0, "block_size": weight.block_size}
        values = weight.values.flatten(1)[:, : weight.inputs].T
        if weight.zero_points is None:
            self.register_buffer("values", (values.to(torch.int16) - 128).to(torch.int8).contiguous())
            self.register_buffer("zero_points", None)
        else:
            self.register_buffer("values", values.contiguous())
            self.register_buffer("zero_points", weight.zero_points.T.contiguous())
        self.register_buffer("scales", weight.scales.T.contiguous())

    def dequantized(self, columns: torch.Tensor | None = None) -> torch.Tensor:
        """The weight [inputs, outputs], or some of its columns, in the scales' type."""
        tensors = [self.values, self.scales, self.zero_points]
        if columns is not None:
            tensors = [None if tensor is None else tensor.index_select(1, columns) for tensor in tensors]
        given = [tensor for tensor in tensors if tensor is not None]
        weight: torch.Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            given,
            attrs=dict(self.attributes),
            dtype=self.scales.dtype,
            shape=given[0].shape,
            version=21,
        )
        return weight


class _RoundedByOutput(_Rounded):
    """The same with a scale of float16 for each output."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__(weight)
        self.attributes = {"axis": 1}
        self.scales = self.scales.flatten().half()


class _RoundedLinear(torch.nn.Module):
    """A `DequantizeLinear` and a `MatMul`; of a blockwise one onnxruntime makes one `MatMulNBits` (1.32)."""

    def __init__(self, rounded: _Rounded, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.rounded = rounded
        self.bias = bias

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        output = activation @ self.rounded.dequantized()
        return output if self.bias is None else output + self.bias


class _RoundedEmbedding(torch.nn.Module):
    """Dequantises the columns that are looked up of the very table that a tied output projection multiplies with."""

    def __init__(self, rounded: _Rounded) -> None:
        super().__init__()
        self.rounded = rounded

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[batch, sequence] int64 to [batch, sequence, inputs]."""
        return self.rounded.dequantized(token_ids.flatten()).T.reshape(*token_ids.shape, -1)


_ONNXRUNTIMES = (_Packed, _QuantizedLinear, _QuantizedEmbedding)
_GPU = (_PackedForGpu, _GpuLinear, _QuantizedEmbedding)
_STANDARD = (_Rounded, _RoundedLinear, _RoundedEmbedding)
_BY_OUTPUT = (_RoundedByOutput, _RoundedLinear, _RoundedEmbedding)


def as_exact(graph: Any) -> None:
    """Make a graph (`onnx.ModelProto`) compute with activations in float32, which is slower, to compare it."""
    for node in graph.graph.node:
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1
