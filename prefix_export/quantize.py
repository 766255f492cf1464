"""The weights of linear layers in 8 or 4 bits, block by block: rounded in the model, packed in the graph.

A weight [outputs, inputs] is cut along its inputs into blocks that share one float32 scale and, where they are not
symmetric, a zero point. The quantiser is onnxruntime's (1.32, `quantization/matmul_nbits_quantizer.py`), and so is the
operator that multiplies with what it packs, `com.microsoft::MatMulNBits`. TensorRT takes one scale for each output,
above zero, in the type that it computes in. The model itself keeps the rounded weights in float32: the source framework
runs it as it is, and is what the graph is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
    HQQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantizer,
)
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import ExportError
from .targets import Target

BITS = {"int8": 8, "int4": 4}
METHODS = ("rtn", "hqq")
# At 8 bits a longer block costs no accuracy that can be measured and reads a tenth less memory a token.
DEFAULT_BLOCK_SIZES = {"int8": 128, "int4": 32}
_BLOCK_SIZES = (16, 32, 64, 128, 256)
# Activations are rounded to 8 bits, block by block, which is what the fast kernels multiply.
_ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Quantization:
    """How weights are rounded.

    Attributes:
        bits: 8 or 4.
        block_size: inputs that share a scale: 16, 32, 64, 128 or 256; None where all inputs of an output do.
        method: "rtn" rounds to nearest, symmetric around zero; "hqq" searches each block's zero point for the least
            error (Badri & Shaji, "Half-Quadratic Quantization", 2023), which is then rounded itself.
    """

    bits: int
    block_size: int | None
    method: str = "rtn"


def quantization(
    precision: str, block_size: int | None, method: str, *, by_output: bool = False
) -> Quantization | None:
    """The quantisation that a precision stands for; None for those of floating point.

    Args:
        precision: of the weights.
        block_size: that was asked for, or None.
        method: one of `METHODS`.
        by_output: whether the target takes one scale for each output alone.

    Raises:
        ExportError: a block size or method that there is not, or that does not go with the precision.
    """
    if method not in METHODS:
        raise ExportError(f"quantizer: expected one of {', '.join(METHODS)}, found {method!r}")
    if precision not in BITS:
        if block_size is not None or method != "rtn":
            raise ExportError(f"block size, quantizer: expected precision int8 or int4 with them, found {precision}")
        return None
    if by_output:
        if block_size is not None or method != "rtn":
            raise ExportError(
                "block size, quantizer: expected none and rtn for a target whose weights have a scale for each output, "
                f"found {block_size if block_size is not None else 'none'} and {method}"
            )
        return Quantization(BITS[precision], None)
    size = DEFAULT_BLOCK_SIZES[precision] if block_size is None else block_size
    if size not in _BLOCK_SIZES:
        raise ExportError(f"block size: expected one of {', '.join(map(str, _BLOCK_SIZES))}, found {size}")
    return Quantization(BITS[precision], size, method)


@dataclass(frozen=True)
class PackedWeight:
    """A weight as `MatMulNBits` takes it.

    Attributes:
        inputs, outputs: of the linear layer.
        values: [outputs, blocks, block_size * bits / 8] uint8.
        scales: [outputs, blocks] float32.
        zero_points: [outputs, blocks * bits / 8, rounded up] uint8, or None where each is half of the range.
    """

    inputs: int
    outputs: int
    settings: Quantization
    values: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    @property
    def block_size(self) -> int:
        """Inputs that share a scale, at most."""
        return self.settings.block_size or self.inputs

    def dequantized(self) -> torch.Tensor:
        """The weight that it stands for, [outputs, inputs] float32."""
        bits = self.settings.bits
        values = _unpacked(self.values, bits).float()
        zeros: torch.Tensor | float = float(2 ** (bits - 1))
        if self.zero_points is not None:
            zeros = _unpacked(self.zero_points, bits)[:, : self.scales.shape[1], None].float()
        weight = (values - zeros) * self.scales[..., None]
        return weight.flatten(1)[:, : self.inputs].contiguous()


def pack(weight: torch.Tensor, settings: Quantization) -> PackedWeight:
    """Quantise a weight [outputs, inputs] float32."""
    if settings.block_size is None:
        return _round_by_output(weight, settings)
    size = _block_size(weight.shape[1], settings.block_size)
    settings = Quantization(settings.bits, size, settings.method)
    rounded = _round_to_nearest if settings.method == "rtn" else _half_quadratic
    return PackedWeight(weight.shape[1], weight.shape[0], settings, *rounded(weight, settings.bits, size))


def _round_by_output(weight: torch.Tensor, settings: Quantization) -> PackedWeight:
    """To nearest, symmetric; scales are numbers of float16."""
    half = 2 ** (settings.bits - 1)
    scales = (weight.abs().amax(1, keepdim=True) / (half - 1)).half().float()
    scales[scales == 0] = 1  # of an output that is next to none, which becomes zero
    values = (weight / scales).round().clamp(1 - half, half - 1) + half
    return PackedWeight(weight.shape[1], weight.shape[0], settings, values.to(torch.uint8)[:, None], scales, None)


def _block_size(inputs: int, size: int) -> int:
    """The size asked for, or the largest below it that does not pad the last block by more than it must."""
    while size > 32 and inputs % size:
        size //= 2
    return size


def _round_to_nearest(weight: torch.Tensor, bits: int, size: int) -> tuple[torch.Tensor, torch.Tensor, None]:
    config = DefaultWeightOnlyQuantConfig(block_size=size, is_symmetric=True, bits=bits)
    values, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight.T.numpy()))
    return torch.from_numpy(values), torch.from_numpy(scales), None


def _half_quadratic(weight: torch.Tensor, bits: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    quantizer = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=size, bits=bits))
    _, scales, zeros = quantizer.quantize_internal(weight, bits=bits, group_size=size)
    # A zero point that is no whole number keeps onnxruntime from its fast kernels: it is rounded, and the values anew.
    zeros = zeros.round().clamp(0, 2**bits - 1)
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
    values = (padded / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return _packed(values.to(torch.uint8), bits), scales.contiguous(), _packed(zeros.to(torch.uint8), bits)


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values below 2^bits, several to a byte along the last axis, the first one lowest."""
    if bits == 8:
        return values.contiguous()
    values = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    return (values[..., 0::2] | values[..., 1::2] << 4).contiguous()


def _unpacked(values: torch.Tensor, bits: int) -> torch.Tensor:
    return values if bits == 8 else torch.stack((values & 15, values >> 4), -1).flatten(-2)


class QuantizedModel:
    """A model whose linear weights, the tied output projection's included, and embedding were rounded in place.

    Args:
        model: in float32; its weights are overwritten by what their quantised values stand for.
        settings: how they are rounded.
    """

    def __init__(self, model: PreTrainedModel, settings: Quantization) -> None:
        self.settings = settings
        self._model = model
        self._packed: dict[str, PackedWeight] = {}
        done: dict[int, PackedWeight] = {}  # by parameter: tied ones are rounded once
        for name, module in model.named_modules():
            if _is_quantized(module, model, settings):
                weight: torch.nn.Parameter = module.weight
                if id(weight) not in done:
                    done[id(weight)] = _round_in_place(weight, settings, transposed=isinstance(module, Conv1D))
                self._packed[name] = done[id(weight)]

    @contextmanager
    def packed(self, target: Target) -> Iterator[None]:
        """Put modules that emit a target's operators in the place of linear layers and embedding, for the trace."""
        before = {name: self._model.get_submodule(name) for name in self._packed}
        if target.is_for_gpu and self.settings.method == "hqq":
            # The operator takes zero points of 4 bits in other places there (onnxruntime 1.32): looked up as it is.
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
    found: torch.nn.Module
    if isinstance(module, torch.nn.Embedding):
        found = embedding(shared[id(weight)])
    else:
        found = linear(shared[id(weight)], module.bias)
    return found


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
    zeros = _unpacked(weight.zero_points, weight.settings.bits)
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
