"""A weight in 8 or 4 bits: how it is rounded and packed.

A weight [outputs, inputs] is cut along its inputs into blocks that share one float32 scale and, where they are not
symmetric, a zero point. The quantiser is onnxruntime's (1.32, `quantization/matmul_nbits_quantizer.py`). TensorRT takes
one scale for each output, above zero, in the type that it computes in.
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
        values = unpacked(self.values, bits).float()
        zeros: torch.Tensor | float = float(2 ** (bits - 1))
        if self.zero_points is not None:
            zeros = unpacked(self.zero_points, bits)[:, : self.scales.shape[1], None].float()
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


def unpacked(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of so many bits, a byte each, of what several of them share."""
    return values if bits == 8 else torch.stack((values & 15, values >> 4), -1).flatten(-2)
