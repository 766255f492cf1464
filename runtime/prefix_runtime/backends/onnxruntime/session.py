"""onnxruntime: opening a graph, binding arrays to its inputs and outputs, running it."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

# onnxruntime 1.32 notes every process in a database under the user's cache folder, for its makers. What runs on other
# people's devices does so only where its user says so, by setting this variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    import onnxruntime as ort
except ImportError as error:
    message = "prefix-runtime needs onnxruntime: pip install 'prefix-runtime[cpu]'"
    raise ImportError(message, name="onnxruntime") from error

from prefix_runtime.backends.options import PROVIDERS, TENSORRT_ENGINE, Cuda, check_threads
from prefix_runtime.backends.registry import check_known
from prefix_runtime.errors import ProviderError
from prefix_runtime.os_errors import write_error

from .huge_pages import opening
from .tensorrt_provider import add_plugin

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.device import Device

_NEEDS = {
    "cuda": "CUDA 13 and cuDNN 9: pip install 'prefix-runtime[gpu]'",
    "tensorrt": "onnxruntime-gpu and the TensorRT that it was built with: pip install onnxruntime-gpu tensorrt",
    "tensorrt-rtx": "onnxruntime's plug-in, or an onnxruntime that has it: pip install onnxruntime-ep-nv-tensorrt-rtx",
}
_ERROR_SEVERITY = 3
# The accuracy levels of MatMulNBits, which onnxruntime makes of a blockwise DequantizeLinear and a MatMul.
_FLOAT_ACTIVATIONS, _ROUNDED_ACTIVATIONS = "1", "4"
_WITHOUT_GRAPH = -1  # a run that is neither captured nor replayed
_Result = TypeVar("_Result")
_environment_lock = threading.Lock()
_BFLOAT16 = 16  # in ONNX; numpy has none, so that its bits are kept as uint16


class Session:
    """An ONNX graph opened by onnxruntime; may be run by many threads at once, each with a `Binding` of its own.

    Args:
        path: the graph; its external weights lie beside it.
        provider: the execution provider: "cpu", "cuda", "tensorrt" or "tensorrt-rtx", or a `Cuda`.
        threads: of one run; None leaves the choice to onnxruntime (one a physical core).
        is_exact: compute with activations in float32 where weights in standard operators are rounded; slower.
        device: the GPU; None finds the one that the provider names.
        provider_options: for "tensorrt" and "tensorrt-rtx"; see `tensorrt_provider`.

    Attributes:
        inputs: the names of the graph's inputs, those that may be left out included.
        outputs: the names of its outputs.
        device: the GPU, or None.

    Raises:
        ProviderError: the provider is unknown or not installed, there is no such GPU, or onnxruntime refuses the graph.
    """

    def __init__(
        self,
        path: Path,
        provider: str | Cuda = "cpu",
        threads: int | None = None,
        *,
        is_exact: bool = False,
        device: Device | None = None,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(provider, Cuda) or provider == "cuda":
            chosen = provider if isinstance(provider, Cuda) else Cuda()
            provider, device = "cuda", device or _device(chosen)
        options = ort.SessionOptions()
        level = _FLOAT_ACTIVATIONS if is_exact else _ROUNDED_ACTIVATIONS
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        if provider == "cuda":
            # Of cuBLAS' kernel and onnxruntime's own for a few rows the faster one, measured once for each shape.
            options.add_session_config_entry("ep.cuda.enable_gemm_auto_tune", "1")
        if threads is not None:
            check_threads(threads)
            options.intra_op_num_threads = int(threads)
        self.device = device
        self._thread = _RunningThread(device) if provider == "cuda" and device is not None else None
        self._session = self._in_thread(lambda: _open(path, provider, options, device, provider_options))
        given = (*self._session.get_inputs(), *self._session.get_overridable_initializers())
        self.inputs = frozenset(each.name for each in given)
        self.outputs = frozenset(each.name for each in self._session.get_outputs())
        self._graphs = count(1)

    def binding(self, *, is_replayed: bool = False) -> Binding:
        """A new, empty binding.

        Args:
            is_replayed: capture its first run as a CUDA graph and replay that from then on: what is bound, and where,
                must not change, but its content may. On other providers it is run as any other.
        """
        return Binding(self, next(self._graphs) if is_replayed else _WITHOUT_GRAPH)

    def ask(self, work: Callable[[ort.InferenceSession], _Result]) -> _Result:
        """Have something done with what was opened, in the thread that it is to be done in.

        On the provider "cuda" who asks must not be in a turn at the GPU.
        """
        return self._in_thread(lambda: work(self._session))

    def release(self, graph: int) -> None:
        """Let go of what a binding's run was captured as; the memory that it names is about to be freed."""
        if self._thread is None:
            self._session.release_captured_graph(graph)
        else:
            self._thread.ask_for_later(lambda: self._session.release_captured_graph(graph))

    def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return work() if self._thread is None else self._thread.ask(work)


class Binding:
    """Arrays bound to a graph's inputs and outputs: a run reads and writes them where they are, nothing is copied.

    With a GPU, what lies there is bound by its address. With an output there, a run has been asked of the GPU's stream
    when it returns, and may not be over. Arrays of the host are copied by onnxruntime.
    """

    def __init__(self, session: Session, graph: int = _WITHOUT_GRAPH) -> None:
        self._session, self._device = session, session.device
        self._options, self._waiting_options = ort.RunOptions(), ort.RunOptions()
        self._is_waiting = True
        if self._device is not None:
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            for options in (self._options, self._waiting_options):
                options.add_run_config_entry("gpu_graph_id", str(graph))
            if graph != _WITHOUT_GRAPH:
                weakref.finalize(self, session.release, graph).atexit = False
        self._binding = session.ask(lambda opened: opened.io_binding())
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

    def input_at(self, name: str, address: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Bind memory of the GPU to an input, which must stay where it is as long as it is bound; errors as `input`."""
        try:
            self._binding.bind_input(name, *self._place(address, shape, dtype))
        except Exception as error:  # as above
            raise ProviderError(f"the graph has no input {name!r} as the manifest describes it: {error}") from error

    def output_at(self, name: str, address: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Bind memory of the GPU to an output; see `input_at`."""
        try:
            self._binding.bind_output(name, *self._place(address, shape, dtype))
        except Exception as error:  # as above
            raise ProviderError(f"the graph has no output {name!r} as the manifest describes it: {error}") from error
        self._is_waiting = False  # nothing comes back to the host

    def _place(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> tuple[Any, ...]:
        assert self._device is not None
        return self._device.kind, self._device.index, _BFLOAT16 if dtype == np.uint16 else dtype.type, shape, address

    def run(self) -> None:
        """Run the graph on what is bound.

        Raises:
            ProviderError: the run fails.
        """
        try:
            options = self._waiting_options if self._is_waiting else self._options
            self._session.ask(lambda opened: opened.run_with_iobinding(self._binding, options))
        except Exception as error:  # as above
            raise ProviderError(f"onnxruntime {ort.__version__} cannot run the graph: {error}") from error


class _RunningThread:
    """The thread in which a session is opened and run on a GPU, whoever asks.

    onnxruntime's CUDA provider keeps handles, memory and captured graphs for each thread that has run a session, as
    long as that lives (1.31: 75 MB a thread for the smallest model).
    """

    def __init__(self, device: Device) -> None:
        self._device, self._pool = device, ThreadPoolExecutor(1, "prefix-runtime-cuda")
        self._for_later: deque[Callable[[], object]] = deque()

    def ask(self, work: Callable[[], _Result]) -> _Result:
        """Have something done, and wait for it; without a turn at the GPU, which this thread needs."""
        return self._pool.submit(self._do, work).result()

    def ask_for_later(self, work: Callable[[], object]) -> None:
        """Have something done before what is asked next. Takes no lock, as finalisers call it: it queues."""
        self._for_later.append(work)

    def _do(self, work: Callable[[], _Result]) -> _Result:
        with self._device.turn():
            while self._for_later:
                self._for_later.popleft()()
            return work()


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
        raise write_error(path, error) from error


def run_with_adapter(session: Session, adapter: Path, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """A graph's first output while one of onnxruntime's adapter files, as `save_adapter` writes them, is active.

    Raises:
        ProviderError: the file is none, or names no inputs of the graph, or the run fails.
    """
    options, loaded = ort.RunOptions(), ort.LoraAdapter()
    try:
        loaded.Load(str(adapter.absolute()))
        options.add_active_adapter(loaded)
        found: np.ndarray = session.ask(lambda opened: opened.run(None, dict(inputs), options))[0]
    except Exception as error:  # as above
        raise ProviderError(
            f"{adapter}: onnxruntime {ort.__version__} cannot run the graph with it: {error}"
        ) from error
    return found


def check_provider(provider: str) -> None:
    """Refuse an execution provider that is unknown or not installed.

    Raises:
        ProviderError
    """
    if provider != TENSORRT_ENGINE:
        _provider_name(provider)


def onnxruntime_version() -> str:
    """Of what runs graphs here."""
    version: str = ort.__version__
    return version


def _open(
    path: Path,
    provider: str,
    options: ort.SessionOptions,
    device: Device | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    options.log_severity_level = _ERROR_SEVERITY
    name = _provider_name(provider)
    providers: list[Any] | None = [(name, dict(provider_options) if provider_options else _provider_options(device))]
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
            f"provider {provider!r}: onnxruntime {ort.__version__} cannot load it: it needs {_NEEDS[provider]}"
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


def _device(options: Cuda) -> Device:
    check_provider("cuda")
    try:
        from prefix_runtime.backends.gpu.device import Device
    except ImportError as error:
        raise ProviderError(str(error)) from error
    return Device(options)


def _provider_options(device: Device | None) -> dict[str, str]:
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


def _provider_name(provider: str) -> str:
    check_known(provider)
    name = PROVIDERS[provider]
    available: Sequence[Any] = ort.get_available_providers()
    if name not in available and provider != "tensorrt-rtx":  # which may come as a plug-in
        hint = f"; it needs {_NEEDS[provider]}" if provider in _NEEDS else ""
        raise ProviderError(f"provider {provider!r}: this onnxruntime has only {', '.join(available)}{hint}")
    return name
