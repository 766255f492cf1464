"""What onnxruntime's TensorRT providers are told of a bundle: ranges of sizes, and where to keep what they build."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from prefix_runtime.backends.tensorrt.profile import covering, limits
from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.errors import ProviderError

_PREFIXES = {"tensorrt": "trt", "tensorrt-rtx": "nv"}
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


def provider_options(provider: str, bundle: Bundle, folder: Path, max_batch: int | None = None) -> dict[str, str]:
    """The options of "tensorrt" or "tensorrt-rtx" for a bundle.

    They have one profile for prompts and decode steps: a run of one of the two providers would have to say which of
    several it takes, one of the other cannot.

    Args:
        provider: "tensorrt" or "tensorrt-rtx".
        bundle: of a portable graph.
        folder: for what they build; must be there when a session is opened.
        max_batch: rows that decode together.

    Raises:
        BundleError: a graph that is not of standard operators.
        RequestError: `max_batch` is out of range.

    Source: onnxruntime's documentation of the TensorRT execution provider; tensorrt_rtx_provider_options.h of
        onnxruntime-ep-nv-tensorrt-rtx 0.5.
    """
    ranges = covering(bundle.manifest, limits(bundle.manifest, max_batch)).inputs
    prefix = _PREFIXES[provider]
    options = {
        f"{prefix}_profile_{word}_shapes": ",".join(
            f"{name}:{_sizes(shapes[place])}" for name, shapes in ranges.items()
        )
        for place, word in enumerate(("min", "opt", "max"))
    }
    if provider == "tensorrt-rtx":
        return options | {"nv_runtime_cache_path": str(folder)}
    return options | {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "0",  # computes as the graph says: float16 where the bundle is
    }


def add_plugin(ort: Any, session_options: Any, options: dict[str, str], index: int = 0) -> None:
    """Let a session run on TensorRT for RTX by the plug-in that NVIDIA keeps apart from onnxruntime.

    Args:
        ort: onnxruntime.
        session_options: of the session.
        options: see `provider_options`.
        index: of the GPU, among those that the plug-in runs on.

    Raises:
        ProviderError: there is no plug-in, or no GPU that it runs on.
    """
    try:
        plugin = importlib.import_module(_PLUGIN)
    except ImportError as error:
        raise ProviderError(
            "provider 'tensorrt-rtx': expected onnxruntime's plug-in for TensorRT for RTX, found none; "
            "pip install onnxruntime-ep-nv-tensorrt-rtx"
        ) from error
    name = plugin.get_ep_name()
    devices = _devices(ort, name)
    if not devices:
        try:
            ort.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # onnxruntime's own errors share no base
            raise ProviderError(
                f"provider 'tensorrt-rtx': expected a plug-in that loads, which needs NVIDIA's driver, found: {error}"
            ) from error
        devices = _devices(ort, name)
    if not 0 <= index < len(devices):
        raise ProviderError(
            f"provider 'tensorrt-rtx': expected an RTX GPU (Ampere or later) with NVIDIA's driver, found "
            f"{len(devices)}; take provider 'cpu', or 'cuda' on other GPUs"
        )
    session_options.add_provider_for_devices([devices[index]], options)


def _devices(ort: Any, name: str) -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == name]


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
