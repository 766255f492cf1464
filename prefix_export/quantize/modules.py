"""Quantize the weights of a model's linear layers to 8 or 4 bits: rounded in the model, packed in the graph.

The graph multiplies with packed weights through onnxruntime's `com.microsoft::MatMulNBits`, or, in standard operators,
through `DequantizeLinear` and `MatMul`. The model itself keeps the rounded weights in float32. So the source framework
can run it, and the graph is compared with the result.
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

# The fast kernels round activations to 8 bits, block by block.
_ACCURACY_LEVEL = 4


class QuantizedModel:
    """A model whose linear weights and embedding are rounded in place, including a tied output projection.

    Args:
        model: a model in float32; its weights are overwritten by the values that their quantized form stands for.
        settings: how to quantize.
        progress: counts the layers.

    Raises:
        ExportError: a weight is not finite, or too large for a scale; choose another precision.
    """

    def __init__(self, model: PreTrainedModel, settings: Quantization, progress: Progress = SILENT) -> None:
        self.settings = settings
        self._model = model
        self._packed: dict[str, PackedWeight] = {}
        done: dict[int, PackedWeight] = {}  # by parameter, so that tied weights are rounded once
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
        """Within the block, replace linear layers and embedding by modules that emit a target's operators."""
        before = {name: self._model.get_submodule(name) for name in self._packed}
        if target.is_for_gpu and self.settings.method == "hqq":
            # CUDA's operator orders zero points differently (onnxruntime 1.31): keep the embedding in floating point.
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
    # A subclass of Embedding computes something else: keep it. TensorRT does not look up rounded tables.
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
    """The tensors of a packed weight as one module: layers that share a weight share these tensors in the graph."""

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
    """A module that replaces another and emits operators; `emitted`: classes of weights, linears and embeddings."""
    weights, linear, embedding = emitted
    if id(weight) not in shared:
        shared[id(weight)] = weights(weight)
    replacement: torch.nn.Module
    if isinstance(module, torch.nn.Embedding):
        replacement = embedding(shared[id(weight)])
    else:
        replacement = linear(shared[id(weight)], module.bias)
    return replacement


class _QuantizedLinear(torch.nn.Module):
    """Emits `com.microsoft::MatMulNBits` (onnxruntime 1.32, docs/ContribOperators.md)."""

    _settings: Mapping[str, int] = MappingProxyType({"accuracy_level": _ACCURACY_LEVEL})

    def __init__(self, packed: _Packed, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Map [..., inputs] to [..., outputs]."""
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
    """Emits `com.microsoft::GatherBlockQuantized` on the same table as a tied output projection."""

    zero_points: torch.Tensor | None

    def __init__(self, packed: _Packed) -> None:
        super().__init__()
        self.packed = packed
        self.register_buffer("zero_points", _bytes_of_zero_points(packed.weight))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Map [batch, sequence] int64 to [batch, sequence, inputs]."""
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
    """The zero points [vocab, blocks, 1] uint8, one per byte, because blocks have their own axis here; None if none."""
    if weight.zero_points is None:
        return None
    zeros = unpacked(weight.zero_points, weight.settings.bits)
    return zeros[:, : weight.scales.shape[1], None].contiguous()


class _PackedForGpu(_Packed):
    """The same with float16 scales, and rows padded to a multiple of 64 if their number is not a multiple of 8.

    onnxruntime's kernel for one row of activations needs a multiple of 8 outputs. For others it would dequantize the
    whole weight in every step (1.32).
    """

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__(weight)
        missing = -weight.outputs % 64 if weight.outputs % 8 else 0
        self.scales = self.scales.half()
        for name, tensor in list(self.named_buffers()):
            setattr(self, name, torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing)))


class _GpuLinear(_QuantizedLinear):
    """The same for CUDA with a separate `Add` for the bias: the next kernel fuses it, the operator would not."""

    _settings: Mapping[str, int] = MappingProxyType({})

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Map [..., inputs] to [..., outputs]."""
        output = self._product(activation, None)
        outputs = self.packed.weight.outputs
        output = output if output.shape[-1] == outputs else output[..., :outputs]
        return output if self.bias is None else output + self.bias


class _Rounded(torch.nn.Module):
    """An 8-bit weight [inputs, outputs] with the scales of its blocks, for `DequantizeLinear`; layers can share it."""

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
        """The weight [inputs, outputs], or some of its columns, in the type of the scales."""
        tensors = [self.values, self.scales, self.zero_points]
        if columns is not None:
            tensors = [None if tensor is None else tensor.index_select(1, columns) for tensor in tensors]
        inputs = [tensor for tensor in tensors if tensor is not None]
        weight: torch.Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            inputs,
            attrs=dict(self.attributes),
            dtype=self.scales.dtype,
            shape=inputs[0].shape,
            version=21,
        )
        return weight


class _RoundedByOutput(_Rounded):
    """The same with one float16 scale for each output."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__(weight)
        self.attributes = {"axis": 1}
        self.scales = self.scales.flatten().half()


class _RoundedLinear(torch.nn.Module):
    """A `DequantizeLinear` and a `MatMul`; onnxruntime fuses a blockwise pair into one `MatMulNBits` (1.32)."""

    def __init__(self, rounded: _Rounded, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.rounded = rounded
        self.bias = bias

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Map [..., inputs] to [..., outputs]."""
        output = activation @ self.rounded.dequantized()
        return output if self.bias is None else output + self.bias


class _RoundedEmbedding(torch.nn.Module):
    """Looks up columns in the same table as a tied output projection, and dequantizes them."""

    def __init__(self, rounded: _Rounded) -> None:
        super().__init__()
        self.rounded = rounded

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Map [batch, sequence] int64 to [batch, sequence, inputs]."""
        return self.rounded.dequantized(token_ids.flatten()).T.reshape(*token_ids.shape, -1)


_ONNXRUNTIMES = (_Packed, _QuantizedLinear, _QuantizedEmbedding)
_GPU = (_PackedForGpu, _GpuLinear, _QuantizedEmbedding)
_STANDARD = (_Rounded, _RoundedLinear, _RoundedEmbedding)
_BY_OUTPUT = (_RoundedByOutput, _RoundedLinear, _RoundedEmbedding)


def as_exact(graph: Any) -> None:
    """Change a graph (`onnx.ModelProto`) to activations in float32, in place: slower, but exact for a comparison."""
    for node in graph.graph.node:
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1
