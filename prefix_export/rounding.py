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

from .errors import ExportError

BITS = {"int8": 8, "int4": 4}
METHODS = ("rtn", "hqq")
DEFAULT_BLOCK_SIZE = 32
"""Of which onnxruntime's kernels compute a row of a batch as they do the row alone, to the last bit (1.32, x86)."""
_BLOCK_SIZES = (16, 32, 64, 128, 256)


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
    size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
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
