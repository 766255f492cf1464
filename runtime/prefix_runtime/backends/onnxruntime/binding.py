"""Arrays bound to the inputs and outputs of a graph, and its runs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from prefix_runtime.errors import ProviderError

from .library import ort

if TYPE_CHECKING:
    from .session import Session

WITHOUT_GRAPH = -1
"""A run that is neither captured nor replayed."""
_BFLOAT16 = 16  # in ONNX; numpy has none, so that its bits are kept as uint16


class Binding:
    """Arrays bound to a graph's inputs and outputs: a run reads and writes them where they are, nothing is copied.

    With a GPU, what lies there is bound by its address. With an output there, a run has been asked of the GPU's stream
    when it returns, and may not be over. Arrays of the host are copied by onnxruntime.
    """

    def __init__(self, session: Session, graph: int = WITHOUT_GRAPH) -> None:
        self._session, self._device = session, session.device
        self._options, self._waiting_options = ort.RunOptions(), ort.RunOptions()
        self._is_waiting = True
        if self._device is not None:
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            for options in (self._options, self._waiting_options):
                options.add_run_config_entry("gpu_graph_id", str(graph))
            if graph != WITHOUT_GRAPH:
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
        except Exception as error:  # onnxruntime's own errors share no base
            raise ProviderError(f"the graph has no input {name!r} as the manifest describes it: {error}") from error
        self._arrays[name] = array

    def output(self, name: str, array: np.ndarray) -> None:
        """Bind a C-contiguous array to an output, in place of what was bound there; errors as for `input`."""
        try:
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        except Exception as error:  # onnxruntime's own errors share no base
            raise ProviderError(f"the graph has no output {name!r} as the manifest describes it: {error}") from error
        self._arrays[name] = array

    def input_at(self, name: str, address: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Bind memory of the GPU to an input, which must stay where it is as long as it is bound; errors as `input`."""
        try:
            self._binding.bind_input(name, *self._place(address, shape, dtype))
        except Exception as error:  # onnxruntime's own errors share no base
            raise ProviderError(f"the graph has no input {name!r} as the manifest describes it: {error}") from error

    def output_at(self, name: str, address: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Bind memory of the GPU to an output; see `input_at`."""
        try:
            self._binding.bind_output(name, *self._place(address, shape, dtype))
        except Exception as error:  # onnxruntime's own errors share no base
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
        except Exception as error:  # onnxruntime's own errors share no base
            raise ProviderError(f"onnxruntime {ort.__version__} cannot run the graph: {error}") from error
