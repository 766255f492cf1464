"""Where a graph runs, and what an application may choose of it."""

from __future__ import annotations

from dataclasses import dataclass

from prefix_runtime.checks import is_whole
from prefix_runtime.errors import ProviderError

TENSORRT_PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "tensorrt-rtx": "NvTensorRTRTXExecutionProvider"}
TENSORRT_ENGINE = "tensorrt-engine"
"""The provider that is none of onnxruntime's: an engine that was built before."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", **TENSORRT_PROVIDERS}
"""onnxruntime's execution providers, by the names that `load` takes."""
_MOST_THREADS = 512  # onnxruntime starts any number, which takes minutes


@dataclass(frozen=True)
class Cuda:
    """The execution provider "cuda", with what an application may choose of it.

    Attributes:
        device: the GPU's number; an engine runs on one, and a process may have an engine for each.
        memory_limit: bytes that onnxruntime may take there for weights and intermediate results; None for no limit.
            Buffers of keys and values are bounded by `load`'s `cache_bytes`, resident prefixes by `prefix_bytes`.
        stream: the address of a `cudaStream_t` on that GPU that outlives the engine and that all is ordered on; None
            for one of the engine's own. Engines that are given the same take turns. Those with streams of their own run
            at once, and when two have replayed CUDA graphs each one's steps take longer (1.13 times, GPT-2-medium).
        prefix_bytes: that prefixes may take on the GPU; beyond, the least recently used are on the host alone.
        uses_graphs: whether decode steps are captured as CUDA graphs and replayed.

    Raises:
        ProviderError: a setting out of its range.
    """

    device: int = 0
    memory_limit: int | None = None
    stream: int | None = None
    prefix_bytes: int = 4 << 30
    uses_graphs: bool = True

    def __post_init__(self) -> None:
        _check("device", self.device, 0)
        _check("prefix_bytes", self.prefix_bytes, 0)
        if not isinstance(self.uses_graphs, bool):
            raise ProviderError(f"cuda: uses_graphs: expected True or False, found {self.uses_graphs!r}")
        for name in ("memory_limit", "stream"):
            if (value := getattr(self, name)) is not None:
                _check(name, value, 1)


def check_threads(threads: int) -> None:
    """Refuse a number of threads that no session can be given.

    Raises:
        ProviderError: give a whole number of at least 1, or None.
    """
    if not is_whole(threads, 1, _MOST_THREADS):
        raise ProviderError(f"threads: expected 1 to {_MOST_THREADS}, found {threads!r}")


def _check(name: str, value: object, least: int) -> None:
    if not is_whole(value, least):
        raise ProviderError(f"cuda: {name}: expected a whole number, {least} or more, found {value!r}")
