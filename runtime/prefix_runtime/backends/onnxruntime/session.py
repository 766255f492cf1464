"""A graph opened by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prefix_runtime.backends.gpu import open_device
from prefix_runtime.backends.options import Cuda, check_threads

from .binding import WITHOUT_GRAPH, Binding
from .library import ort
from .opening import open_graph
from .providers import check_provider
from .worker_thread import WorkerThread

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.device import Device

# The accuracy levels of MatMulNBits, which onnxruntime makes of a blockwise DequantizeLinear and a MatMul.
_FLOAT_ACTIVATIONS, _ROUNDED_ACTIVATIONS = "1", "4"
_Result = TypeVar("_Result")


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
            provider = "cuda"
            if device is None:
                check_provider(provider)
                device = open_device(chosen)
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
        open_session = partial(open_graph, path, provider, options, device, provider_options)
        # On a GPU the thread owns the session: nothing else may keep it.
        self._thread = WorkerThread(device, open_session) if provider == "cuda" and device is not None else None
        self._session = open_session() if self._thread is None else None
        self.inputs, self.outputs = self.ask(_names)
        self._graphs = count(1)

    def binding(self, *, is_replayed: bool = False) -> Binding:
        """A new, empty binding.

        Args:
            is_replayed: capture its first run as a CUDA graph and replay that from then on: what is bound, and where,
                must not change, but its content may. On other providers it is run as any other.
        """
        return Binding(self, next(self._graphs) if is_replayed else WITHOUT_GRAPH)

    def ask(self, work: Callable[[ort.InferenceSession], _Result]) -> _Result:
        """Have something done with what was opened, in the thread that it is to be done in.

        On the provider "cuda" who asks must not be in a turn at the GPU.
        """
        if self._thread is not None:
            return self._thread.ask(work)
        assert self._session is not None
        return work(self._session)

    def release(self, graph: int) -> None:
        """Drop what a binding's run was captured as: the memory that it names is about to be freed.

        Takes no lock, because finalisers call it.
        """
        if self._thread is not None:
            self._thread.ask_for_later(lambda opened: opened.release_captured_graph(graph))
        elif self._session is not None:
            self._session.release_captured_graph(graph)


def _names(session: ort.InferenceSession) -> tuple[frozenset[str], frozenset[str]]:
    """The names of a graph's inputs and outputs."""
    given = (*session.get_inputs(), *session.get_overridable_initializers())
    return frozenset(each.name for each in given), frozenset(each.name for each in session.get_outputs())
