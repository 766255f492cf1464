"""Load a GGUF file with transformers' own loader, as a plain model in float32."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedConfig

from prefix_export.errors import ModelError, UnsupportedArchitectureError

from .gguf_file import INSTALL, Header, Value

_NO_ARCHITECTURES = {"general", "tokenizer"}
_NO_SCALING = (None, "none")
# llama.cpp stores one number per frequency instead of these parameters. All published Llama 3.1 to 3.3 models have
# these three values. Source: ggml-org/llama.cpp, convert_hf_to_gguf.py (pull request 8676).
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_FREQUENCIES = "rope_freqs.weight"
_LONG_FACTORS = "rope_factors_long.weight"
_CLOSE = 1e-4
TEMPORARY = re.compile(r"\S*prefix-export-gguf-\w+")
"""Matches the paths of the folders that `alone` makes, so that messages can replace them."""


@contextmanager
def alone(path: Path) -> Iterator[Path]:
    """A temporary folder that shows only one file, within the block.

    transformers would read a tokenizer.json or an adapter beside a GGUF file, even if it belongs to another model.
    """
    with tempfile.TemporaryDirectory(prefix="prefix-export-gguf-") as folder:
        link = Path(folder) / path.name
        try:
            link.symlink_to(path.resolve())
        except OSError:  # Windows allows links only to some users
            os.link(path.resolve(), link)
        yield Path(folder)


@contextmanager
def silent() -> Iterator[None]:
    """Within the block, hide the loader's own progress bar, which transformers' logging cannot switch off (5.23)."""
    from transformers import modeling_gguf_pytorch_utils

    loader: Any = modeling_gguf_pytorch_utils
    before = loader.tqdm
    loader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        loader.tqdm = before


def loading_arguments() -> dict[str, Any]:
    """Arguments of `from_pretrained` that turn a GGUF file into a plain model, which can be saved.

    Raises:
        ModelError: transformers is too old; the message says what to install.
    """
    if not hasattr(transformers, "GgufConfig"):
        raise ModelError(f"GGUF: expected a transformers with GgufConfig, found {transformers.__version__}; {INSTALL}")
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def check_architecture(name: str, header: Header) -> None:
    """Refuse an architecture that transformers cannot load from GGUF.

    Raises:
        UnsupportedArchitectureError: the message names the architecture, and those that transformers can load.
    """
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # transformers writes some names with an underscore, llama.cpp without or with a hyphen.
    known = {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - _NO_ARCHITECTURES
    if _plain(header.architecture) not in map(_plain, known):
        raise UnsupportedArchitectureError(
            f"model {name!r}: expected a GGUF architecture that transformers {transformers.__version__} can load "
            f"({', '.join(sorted(known))}), found {header.architecture[:60]!r}"
        )
    if header.architecture in ("llama", "mistral") and header.value("expert_count"):
        raise UnsupportedArchitectureError(
            f"model {name!r}: expected a dense model of architecture {header.architecture!r}, found one with "
            f"{header.value('expert_count')} experts, which transformers {transformers.__version__} cannot load from "
            "GGUF; take the original repository"
        )


def _plain(architecture: str) -> str:
    return architecture.replace("_", "").replace("-", "")


def with_positions(name: str, header: Header, config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with the rotary scaling of Llama 3, which transformers 5.23 does not read from the file.

    Raises:
        ModelError: transformers does not read the file's other kind of rotary scaling; use the original repository.
    """
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    is_read = parameters.get("rope_type", "default") != "default"
    scaling = header.value("rope.scaling.type")
    if not is_read and (scaling not in _NO_SCALING or _LONG_FACTORS in header.tensors):
        raise ModelError(
            f"model {name!r}: expected rotary positions that transformers {transformers.__version__} takes from a GGUF "
            f"file, found scaling of type {scaling or 'longrope'!r}, which it leaves out; take the original repository"
        )
    if _FREQUENCIES in header.tensors and not is_read:
        config.rope_parameters = {**parameters, **_llama_3(name, header, parameters)}
    return config


def _llama_3(name: str, header: Header, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of Llama 3's scaling that reproduce the factors in the file."""
    factors = _frequencies(header)
    parameters = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA_3}
    expected = _llama_3_factors(len(factors), float(rope.get("rope_theta", 10000.0)), parameters)
    if len(expected) != len(factors) or np.abs(expected / factors - 1).max() > _CLOSE:
        raise ModelError(
            f"model {name!r}: expected the rotary scaling of Llama 3 in {_FREQUENCIES}, found other factors, which "
            f"transformers {transformers.__version__} leaves out; take the original repository"
        )
    return parameters


def _frequencies(header: Header) -> np.ndarray:
    """The divisors of the rotary frequencies, [head_dim / 2] float32."""
    tensor = header.tensors[_FREQUENCIES]
    with header.path.open("rb") as file:
        file.seek(header.data_start + tensor.offset)
        return np.frombuffer(file.read(4 * tensor.shape[0]), "<f4")


def _llama_3_factors(count: int, theta: float, parameters: Mapping[str, Any]) -> np.ndarray:
    """The factors [count] that Llama 3's parameters give.

    Source: transformers 5.23, modeling_rope_utils, `_compute_llama3_parameters`.
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(count) / count)
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def windows_left_out(name: str, header: Header, config: PreTrainedConfig) -> Iterator[str]:
    """A warning if transformers ignores the file's sliding window."""
    window: Value | None = header.value("attention.sliding_window")
    length = header.value("context_length")
    if not isinstance(window, int) or not isinstance(length, int) or not 0 < window < length:
        return
    if getattr(config.get_text_config(), "sliding_window", None) != window:
        yield (
            f"{name}: transformers {transformers.__version__} leaves out the file's sliding window of {window} "
            "positions: beyond it, text differs from llama.cpp's"
        )
