"""prefix-runtime: run a frozen ONNX model under trained prefixes, without torch.

>>> import prefix_runtime
>>> engine = prefix_runtime.load("bundle")  # doctest: +SKIP
>>> engine.generate("name[Aromi], food[Chinese]", task="e2e", max_new_tokens=64).text  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.options import Cuda
    from .bundle.folder import Bundle
    from .bundle.manifest import Manifest
    from .engine import Engine, load
    from .errors import (
        BenchError,
        BundleError,
        BundleIntegrityError,
        BusyError,
        CompositionError,
        ContextOverflowError,
        DuplicateTaskError,
        PrefixError,
        PrefixMismatchError,
        PrefixRuntimeError,
        ProviderError,
        RequestError,
        TaskError,
        TaskNameError,
        UnknownTaskError,
    )
    from .generation.arguments import GenerationOptions
    from .generation.generation_config import GenerationConfig, GenerationDefaults
    from .generation.results import Chunk, GeneratedSequence, GenerationResult, Metrics, TargetScore
    from .generation.sampling import Sampling
    from .prefix.geometry import Geometry, LayerGeometry
    from .prefix.prefix import LayerPrefix, Prefix, Source

__version__ = "0.1.0"

__all__ = [
    "BenchError",
    "Bundle",
    "BundleError",
    "BundleIntegrityError",
    "BusyError",
    "Chunk",
    "CompositionError",
    "ContextOverflowError",
    "Cuda",
    "DuplicateTaskError",
    "Engine",
    "GeneratedSequence",
    "GenerationConfig",
    "GenerationDefaults",
    "GenerationOptions",
    "GenerationResult",
    "Geometry",
    "LayerGeometry",
    "LayerPrefix",
    "Manifest",
    "Metrics",
    "Prefix",
    "PrefixError",
    "PrefixMismatchError",
    "PrefixRuntimeError",
    "ProviderError",
    "RequestError",
    "Sampling",
    "Source",
    "TargetScore",
    "TaskError",
    "TaskNameError",
    "UnknownTaskError",
    "load",
]

_ERRORS = tuple(name for name in __all__ if name.endswith("Error"))
_MODULES = {
    **dict.fromkeys(_ERRORS, "errors"),
    "GenerationOptions": "generation.arguments",
    "Bundle": "bundle.folder",
    "Engine": "engine",
    "GenerationConfig": "generation.generation_config",
    "GenerationDefaults": "generation.generation_config",
    "load": "engine",
    "Geometry": "prefix.geometry",
    "LayerGeometry": "prefix.geometry",
    "Manifest": "bundle.manifest",
    "LayerPrefix": "prefix.prefix",
    "Prefix": "prefix.prefix",
    "Source": "prefix.prefix",
    "Cuda": "backends.options",
    "Chunk": "generation.results",
    "GeneratedSequence": "generation.results",
    "GenerationResult": "generation.results",
    "Metrics": "generation.results",
    "TargetScore": "generation.results",
    "Sampling": "generation.sampling",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: the package itself loads neither numpy nor onnxruntime."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
