"""onnxruntime's adapter files: inputs of a graph that a program in any language makes active."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from prefix_runtime.errors import ProviderError
from prefix_runtime.os_errors import write_error

from .library import ort
from .session import Session


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
    except Exception as error:  # onnxruntime's own errors share no base
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
        output: np.ndarray = session.ask(lambda opened: opened.run(None, dict(inputs), options))[0]
    except Exception as error:  # onnxruntime's own errors share no base
        raise ProviderError(
            f"{adapter}: onnxruntime {ort.__version__} cannot run the graph with it: {error}"
        ) from error
    return output
