"""How weights are quantized: the settings and their checks, which need no torch. `rounding.py` does the work."""

from __future__ import annotations

from dataclasses import dataclass

from prefix_export.errors import ExportError

BITS = {"int8": 8, "int4": 4}
METHODS = ("rtn", "hqq")
DEFAULT_BLOCK_SIZE = 32
"""With this size, onnxruntime's kernels compute a row of a batch exactly as the row alone (1.32, x86)."""
_BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized.

    Attributes:
        bits: 8 or 4.
        block_size: inputs that share a scale: 16, 32, 64, 128 or 256; None if all inputs of an output share one.
        method: "rtn" rounds to nearest, symmetric around zero; "hqq" searches each block's zero point for the least
            error (Badri & Shaji, "Half-Quadratic Quantization", 2023), then rounds the zero point itself.
    """

    bits: int
    block_size: int | None
    method: str = "rtn"


def quantization(
    precision: str, block_size: int | None, method: str, *, by_output: bool = False
) -> Quantization | None:
    """The settings that a precision stands for; None for a floating-point precision.

    Args:
        precision: the precision of the weights.
        block_size: the requested block size, or None for the default.
        method: one of `METHODS`.
        by_output: True if the target takes only one scale for each output.

    Raises:
        ExportError: the block size or the method is unknown, or does not go with the precision.
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
