"""Graphs opened by onnxruntime, and written as it packs them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefix_runtime.errors import ProviderError

from .huge_pages import opening
from .library import ort
from .providers import NEEDS, device_options, execution_provider
from .tensorrt_provider import add_plugin

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.device import Device

_ERROR_SEVERITY = 3
_environment_lock = threading.Lock()


def open_graph(
    path: Path,
    provider: str,
    options: ort.SessionOptions,
    device: Device | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """A session of onnxruntime's own.

    Raises:
        ProviderError: the provider is unknown or not installed, or onnxruntime refuses the graph.
    """
    options.log_severity_level = _ERROR_SEVERITY
    name = execution_provider(provider)
    providers: list[Any] | None = [(name, dict(provider_options) if provider_options else device_options(device))]
    if name not in ort.get_available_providers():
        add_plugin(ort, options, dict(provider_options or {}))
        providers = None  # a plug-in's stand in the options
    if provider in ("cuda", "tensorrt"):
        ort.preload_dlls()  # CUDA's libraries where pip put them
    try:
        with _decoding_kernels() if provider == "cuda" else nullcontext(), opening():
            # Else a failure is printed, and the graph opened a second time by other providers.
            session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own errors share no base but Exception.
        raise ProviderError(f"{path}: onnxruntime {ort.__version__} cannot open the graph: {error}") from error
    if name not in session.get_providers():
        raise ProviderError(
            f"provider {provider!r}: onnxruntime {ort.__version__} cannot load it: it needs {NEEDS[provider]}"
        )
    return session


@contextmanager
def _decoding_kernels() -> Iterator[None]:
    """Leave attention of one token to cuDNN, unless the user says otherwise, while a session is opened.

    onnxruntime prefers its XQA kernel, which takes a block for each head: a step takes 1.04 times as long over a prefix
    of 200, 1.09 without (GPT-2-medium). Its choice is in the environment alone (1.31).
    """
    name = "ORT_ENABLE_XQA"
    with _environment_lock:
        is_chosen = name in os.environ
        try:
            os.environ.setdefault(name, "0")
            yield
        finally:
            if not is_chosen:
                del os.environ[name]


def save_opened(path: Path, target: Path, provider: str = "cpu") -> None:
    """Open a graph and write what became of it: optimised, its weights packed for this processor.

    Args:
        path: the graph.
        target: the file to write; its weights go beside it.
        provider: as for `Session`.

    Raises:
        ProviderError: onnxruntime refuses the graph, or cannot write.
    """
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(target)
    for key, value in {
        "optimized_model_external_initializers_file_name": f"{target.name}.data",
        "optimized_model_external_initializers_min_size_in_bytes": "1024",
        "save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(f"session.{key}", value)
    open_graph(path, provider, options)
