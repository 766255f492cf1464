"""Round and pack a weight in 8 or 4 bits.

A weight [outputs, inputs] is cut along its inputs into blocks. Each block has one float32 scale and, if it is not
symmetric, a zero point. The quantizer is onnxruntime's (1.32, `quantization/matmul_nbits_quantizer.py`). TensorRT takes
one scale above zero for each output, in the type of its activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
    HQQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantizer,
)

from .options import Quantization


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the form of the operator `MatMulNBits`.

    Attributes:
        inputs: the number of inputs of the linear layer.
        outputs: the number of its outputs.
        settings: how the weight was quantized.
        values: [outputs, blocks, block_size * bits / 8] uint8.
        scales: [outputs, blocks] float32.
        zero_points: [outputs, blocks * bits / 8, rounded up] uint8, or None if each is half of the range.
    """

    inputs: int
    outputs: int
    settings: Quantization
    values: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    @property
    def block_size(self) -> int:
        """The largest number of inputs that share a scale."""
        return self.settings.block_size or self.inputs

    def dequantized(self) -> torch.Tensor:
        """The weight that the packed values stand for, [outputs, inputs] float32."""
        bits = self.settings.bits
        values = unpacked(self.values, bits).float()
        zeros: torch.Tensor | float = float(2 ** (bits - 1))
        if self.zero_points is not None:
            zeros = unpacked(self.zero_points, bits)[:, : self.scales.shape[1], None].float()
        weight = (values - zeros) * self.scales[..., None]
        return weight.flatten(1)[:, : self.inputs].contiguous()


def pack(weight: torch.Tensor, settings: Quantization) -> PackedWeight:
    """Quantize a weight [outputs, inputs] float32."""
    if settings.block_size is None:
        return _round_by_output(weight, settings)
    size = _block_size(weight.shape[1], settings.block_size)
    settings = Quantization(settings.bits, size, settings.method)
    rounded = _round_to_nearest if settings.method == "rtn" else _half_quadratic
    return PackedWeight(weight.shape[1], weight.shape[0], settings, *rounded(weight, settings.bits, size))


def _round_by_output(weight: torch.Tensor, settings: Quantization) -> PackedWeight:
    """Round to nearest, symmetric, with one scale for each output; scales are exact in float16."""
    half = 2 ** (settings.bits - 1)
    scales = (weight.abs().amax(1, keepdim=True) / (half - 1)).half().float()
    scales[scales == 0] = 1  # an output that is almost zero becomes zero
    values = (weight / scales).round().clamp(1 - half, half - 1) + half
    return PackedWeight(weight.shape[1], weight.shape[0], settings, values.to(torch.uint8)[:, None], scales, None)


def _block_size(inputs: int, size: int) -> int:
    """The requested size, halved until it divides the inputs, but not below 32."""
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
    # onnxruntime's fast kernels need whole zero points: round them, then round the values again.
    zeros = zeros.round().clamp(0, 2**bits - 1)
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
    values = (padded / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return _packed(values.to(torch.uint8), bits), scales.contiguous(), _packed(zeros.to(torch.uint8), bits)


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack values below 2^bits, several to a byte along the last axis; the first value takes the lowest bits."""
    if bits == 8:
        return values.contiguous()
    values = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    return (values[..., 0::2] | values[..., 1::2] << 4).contiguous()


def unpacked(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of packing: one value per byte."""
    return values if bits == 8 else torch.stack((values & 15, values >> 4), -1).flatten(-2)
