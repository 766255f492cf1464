"""Check a model's config.json before transformers reads it: quantized weights and custom code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from prefix_export.errors import ModelError, UnsupportedArchitectureError

_MOST_BYTES = 16 << 20
_DEEPEST = 4
# mlx writes "quantization"; compressed-tensors wrote "compression_config" before version 0.6.
_KEYS = ("quantization_config", "compression_config", "quantization")
# AutoGPTQ, AutoAWQ and NVIDIA's ModelOpt write these beside a config.json that does not mention them.
QUANTIZED_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Files that only a folder with quantized weights has, and the method that writes them."""

_SCALES = frozenset(
    {"SCB", "absmax", "g_idx", "qweight", "qzeros", "quant_map", "scales", "weight_packed", "weight_scale",
     "weight_scale_inv", "weight_scale_2", "weight_format"}
)  # fmt: skip


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file holds anything else, because transformers' own reader reports that.

    Raises:
        ModelError: the file is larger than any configuration.
        OSError: the file cannot be read.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ModelError(f"{path}: expected a configuration of at most {_MOST_BYTES >> 20} MB, found a larger file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def check_weights_are_plain(name: str, content: Mapping[str, Any], files: Iterable[str] = ()) -> None:
    """Refuse a model whose weights are already quantized; `files` are names of files beside its config.json.

    Raises:
        ModelError: the weights are quantized; use the original repository. The message names the method.
    """
    for path, settings in _quantizations(content):
        raise _quantized(name, _method(settings), f"config.json: {path}")
    for file in files:
        if file in QUANTIZED_FILES:
            raise _quantized(name, QUANTIZED_FILES[file], file)


def check_no_scales(name: str, unexpected: Iterable[str]) -> None:
    """Refuse weights that have scales beside them: transformers ignored the scales, so the weights are wrong.

    Args:
        name: the model's name.
        unexpected: names of tensors in the files that the architecture does not have.

    Raises:
        ModelError: there are scales; use the original repository. The message names a tensor.
    """
    scales = sorted(key for key in unexpected if key.rpartition(".")[2] in _SCALES or ".quant_state." in key)
    if scales:
        raise _quantized(name, "a method that config.json does not name", scales[0])


def _quantized(name: str, method: str, where: str) -> ModelError:
    return ModelError(
        f"model {name!r}: expected weights in float32, float16 or bfloat16, found weights quantized by {method} "
        f"({where}); use the original repository, or dequantize them with transformers (dequantize(), then "
        "save_pretrained)"
    )


def _quantizations(content: Mapping[str, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """The quantization settings in a configuration and in the configurations of its parts, with their paths."""
    for key, value in content.items():
        if not isinstance(value, dict) or not value or depth > _DEEPEST:
            continue
        if key in _KEYS:
            yield f"{path}{key}", value
        else:
            yield from _quantizations(value, f"{path}{key}.", depth + 1)


def _method(settings: Mapping[str, Any]) -> str:
    for bits in (4, 8):
        if settings.get(f"load_in_{bits}bit") is True or settings.get(f"_load_in_{bits}bit") is True:
            return f"bitsandbytes ({bits} bits)"
    method = settings.get("quant_method") or settings.get("quant_algo")
    return str(method)[:60] if method else "a method that it does not name"


def own_code(name: str, content: Mapping[str, Any]) -> str | None:
    """A warning if a model comes with code, which is never run; None if it has no code.

    Raises:
        UnsupportedArchitectureError: transformers does not have the architecture, so the model needs its own code.
    """
    code = content.get("auto_map")
    if not code:
        return None
    architecture = content.get("model_type")
    if isinstance(architecture, str) and architecture in CONFIG_MAPPING:
        return (
            f"{name}: the code that comes with the model (auto_map) is not run; transformers' own {architecture!r} is "
            "used"
        )
    raise UnsupportedArchitectureError(
        f"model {name!r}: expected an architecture that transformers {transformers.__version__} has, found "
        f"{str(architecture)[:60]!r}, which needs custom code of the repository (auto_map); prefix-export never runs "
        "code that comes with a model"
    )
