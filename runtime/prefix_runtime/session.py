"""onnxruntime: opening a graph, binding arrays to its inputs and outputs, running it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# onnxruntime 1.32 notes every process in a database under the user's cache folder, for its makers. What runs on other
# people's devices does so only where its user says so, by setting this variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    import onnxruntime as ort
except ImportError as error:
    raise ImportError("prefix-runtime needs onnxruntime: pip install 'prefix-runtime[cpu]'") from error

from .checks import is_whole
from .errors import ProviderError

_PROVIDERS = {"cpu": "CPUExecutionProvider"}
_ERROR_SEVERITY = 3
# The accuracy levels of MatMulNBits, which onnxruntime makes of a blockwise DequantizeLinear and a MatMul.
_FLOAT_ACTIVATIONS, _ROUNDED_ACTIVATIONS = "1", "4"
_MOST_THREADS = 512  # onnxruntime makes as many as it is told, for minutes


class Session:
    """An ONNX graph opened by onnxruntime; may be run by many threads at once, each with a `Binding` of its own.

    Args:
        path: the graph; its external weights lie beside it.
        provider: the execution provider: "cpu".
        threads: of one run; None leaves the choice to onnxruntime (one a physical core).
        is_exact: compute with activations in float32 where weights in standard operators are rounded; slower.

    Attributes:
        inputs: the names of the graph's inputs, those that may be left out included.

    Raises:
        ProviderError: the provider is unknown or not installed, or onnxruntime refuses the graph.
    """

    def __init__(
        self, path: Path, provider: str = "cpu", threads: int | None = None, *, is_exact: bool = False
    ) -> None:
        options = ort.SessionOptions()
        level = _FLOAT_ACTIVATIONS if is_exact else _ROUNDED_ACTIVATIONS
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        if threads is not None:
            check_threads(threads)
            options.intra_op_num_threads = int(threads)
        self._session = _open(path, provider, options)
        given = (*self._session.get_inputs(), *self._session.get_overridable_initializers())
        self.inputs = frozenset(each.name for each in given)

    def binding(self) -> Binding:
        """A new, empty binding."""
        return Binding(self._session)


class Binding:
    """Arrays bound to a graph's inputs and outputs: a run reads and writes them where they are, nothing is copied."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        # onnxruntime is given addresses: the arrays must live as long as they are bound.
        self._arrays: dict[str, np.ndarray] = {}

    def input(self, name: str, array: np.ndarray) -> None:
        """Bind a C-contiguous array to an input, in place of what was bound there.

        Raises:
            ProviderError: the graph has no such input.
        """
        try:
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        except Exception as error:  # as above
            raise ProviderError(f"the graph has no input {name!r} as the manifest describes it: {error}") from error
        self._arrays[name] = array

    def output(self, name: str, array: np.ndarray) -> None:
        """Bind a C-contiguous array to an output, in place of what was bound there; errors as for `input`."""
        try:
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        except Exception as error:  # as above
            raise ProviderError(f"the graph has no output {name!r} as the manifest describes it: {error}") from error
        self._arrays[name] = array

    def run(self) -> None:
        """Run the graph on what is bound.

        Raises:
            ProviderError: the run fails.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # as above
            raise ProviderError(f"onnxruntime {ort.__version__} cannot run the graph: {error}") from error


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
    _open(path, provider, options)


def save_adapter(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write inputs of a graph as one of onnxruntime's adapter files (`AdapterFormat`, onnxruntime 1.32).

    Raises:
        OSError: the disk is full or not writable.
    """
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    try:
        adapter.export_adapter(str(path.absolute()))
    except Exception as error:  # as above
        raise OSError(f"{path}: cannot be written: {error}") from error


def check_threads(threads: int) -> None:
    """Refuse a number of threads that no session can be given.

    Raises:
        ProviderError
    """
    if not is_whole(threads, 1, _MOST_THREADS):
        raise ProviderError(f"threads: expected 1 to {_MOST_THREADS}, found {threads!r}")


def check_provider(provider: str) -> None:
    """Refuse an execution provider that is unknown or not installed.

    Raises:
        ProviderError
    """
    _provider_name(provider)


def onnxruntime_version() -> str:
    """Of what runs graphs here."""
    version: str = ort.__version__
    return version


def _open(path: Path, provider: str, options: ort.SessionOptions) -> ort.InferenceSession:
    options.log_severity_level = _ERROR_SEVERITY
    providers = [_provider_name(provider)]
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own errors share no base but Exception.
        raise ProviderError(f"{path}: onnxruntime {ort.__version__} cannot open the graph: {error}") from error


def _provider_name(provider: str) -> str:
    name = _PROVIDERS.get(provider) if isinstance(provider, str) else None
    if name is None:
        raise ProviderError(f"provider: expected one of {', '.join(_PROVIDERS)}, found {provider!r}")
    available: Sequence[Any] = ort.get_available_providers()
    if name not in available:
        raise ProviderError(f"provider {provider!r}: this onnxruntime has only {', '.join(available)}")
    return name
