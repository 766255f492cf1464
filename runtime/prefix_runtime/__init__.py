"""prefix-runtime: run a frozen ONNX model under trained prefixes, without torch.

>>> import prefix_runtime
>>> engine = prefix_runtime.load("bundle")  # doctest: +SKIP
>>> engine.generate("name[Aromi], food[Chinese]", task="e2e", max_new_tokens=64).text  # doctest: +SKIP
"""

from .arguments import GenerationOptions
from .bundle import Bundle
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
from .geometry import Geometry, LayerGeometry
from .manifest import Manifest
from .prefix import LayerPrefix, Prefix, Source
from .provider import Cuda
from .results import Chunk, GenerationResult, Metrics
from .sampling import Sampling

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
    "TaskError",
    "TaskNameError",
    "UnknownTaskError",
    "load",
]
