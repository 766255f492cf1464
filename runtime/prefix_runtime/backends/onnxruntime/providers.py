"""Execution providers: which there are here, what each needs, and what it is told of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefix_runtime.backends.options import PROVIDERS, TENSORRT_ENGINE
from prefix_runtime.backends.registry import check_known
from prefix_runtime.errors import ProviderError

from .library import ort

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.device import Device

NEEDS = {
    "cuda": "CUDA 13 and cuDNN 9: pip install 'prefix-runtime[gpu]'",
    "tensorrt": "onnxruntime-gpu and the TensorRT that it was built with: pip install onnxruntime-gpu tensorrt",
    "tensorrt-rtx": "onnxruntime's plug-in, or an onnxruntime that has it: pip install onnxruntime-ep-nv-tensorrt-rtx",
}


def check_provider(provider: str) -> None:
    """Refuse an execution provider that is unknown or not installed.

    Raises:
        ProviderError: install the package that the message names.
    """
    if provider != TENSORRT_ENGINE:
        execution_provider(provider)


def execution_provider(provider: str) -> str:
    """Onnxruntime's name of a provider.

    Raises:
        ProviderError: it is unknown, or this onnxruntime has it not.
    """
    check_known(provider)
    name = PROVIDERS[provider]
    available: Sequence[Any] = ort.get_available_providers()
    if name not in available and provider != "tensorrt-rtx":  # which may come as a plug-in
        hint = f"; it needs {NEEDS[provider]}" if provider in NEEDS else ""
        raise ProviderError(f"provider {provider!r}: this onnxruntime has only {', '.join(available)}{hint}")
    return name


def device_options(device: Device | None) -> dict[str, str]:
    """What the provider "cuda" is told of the GPU that it runs on."""
    if device is None or device.kind != "cuda":
        return {}
    chosen = {
        "device_id": str(device.index),
        "user_compute_stream": str(device.stream.handle),
        "enable_cuda_graph": str(int(device.options.uses_graphs)),
        "arena_extend_strategy": "kSameAsRequested",
    }
    limit = device.options.memory_limit
    return chosen if limit is None else chosen | {"gpu_mem_limit": str(limit)}
