"""onnxruntime as a backend: a bundle's graph, or what was kept of it, opened by one of its execution providers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from prefix_runtime.backends.registry import Backend, BackendLimits, OpenRequest
from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.cache.cache import Cache
from prefix_runtime.errors import ProviderError
from prefix_runtime.prefix.prefix import Prefix

from .appending_cache import AppendingCache
from .automatic_packing import discard_packed, find_or_pack
from .huge_pages import letting_go, on_huge_pages
from .packed_graphs import make_provider_folder, provider_folder
from .providers import check_provider
from .session import Session
from .shared_cache import SharedCache
from .tensorrt_provider import provider_options

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.prefix_store import PrefixStore


class OnnxRuntime(Backend):
    """A bundle whose graph onnxruntime runs.

    Args:
        bundle: what the graph is of.
        session: of its graph, or of another with the same contract.

    Attributes:
        session: as given.
        prefixes: those that lie on the GPU; None for graphs that run on a CPU, or take a past from there.
    """

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.session, self.device = session, session.device
        self.prefixes: PrefixStore | None = None
        self._geometry, self._format = bundle.manifest.geometry, bundle.cache_format
        self._is_portable = bundle.manifest.flavour == "portable"
        if self.device is not None and not self._is_portable:
            from prefix_runtime.backends.gpu.prefix_store import PrefixStore

            from .cuda_cache import CudaCache

            budget = self.device.options.prefix_bytes
            self.prefixes = PrefixStore(self.device, self._geometry, self._format, budget)
            self.limits = BackendLimits(capacity_step=CudaCache.CAPACITY_STEP)

    @classmethod
    def open(cls, bundle: Bundle, request: OpenRequest) -> Self:
        """See `Backend`."""
        return cls(bundle, _OPENERS[request.name](bundle, request))

    def make_cache(self, rows: int, capacity: int, task_id: Callable[[Prefix], int] | None = None) -> Cache:
        """See `Backend`."""
        size = self._geometry, rows, capacity
        if self._is_portable:
            return AppendingCache(self.session, *size, cache_format=self._format, task_id=task_id)
        if self.prefixes is None:
            return SharedCache(self.session, *size, cache_format=self._format)
        from .cuda_cache import CudaCache

        return CudaCache(self.session, *size, cache_format=self._format, prefixes=self.prefixes)

    def forget(self, prefix: Prefix) -> None:
        """See `Backend`."""
        if self.prefixes is not None:
            self.prefixes.forget(prefix)


BACKEND = OnnxRuntime


def _open_on_cpu(bundle: Bundle, request: OpenRequest) -> Session:
    packed = None if request.only_own else find_or_pack(bundle, request.prepare)
    if packed is not None:
        try:
            return Session(packed, "cpu", request.threads)
        except ProviderError:  # it is damaged: the bundle's own is whole, or says what is wrong
            with suppress(OSError):
                discard_packed(bundle)
    weights = bundle.graph_path.with_name(f"{bundle.graph_path.name}.data")
    with on_huge_pages(), letting_go(weights):  # packed
        return Session(bundle.graph_path, "cpu", request.threads)


def _open_on_gpu(bundle: Bundle, request: OpenRequest) -> Session:
    # CUDA graphs are not for what is bound elsewhere in every step, as a growing past is.
    uses_graphs = request.cuda.uses_graphs and bundle.manifest.flavour == "fast"
    return Session(bundle.graph_path, replace(request.cuda, uses_graphs=uses_graphs))


def _open_by_tensorrt(bundle: Bundle, request: OpenRequest) -> Session:
    provider = request.name
    options = provider_options(provider, bundle, provider_folder(bundle, provider), request.max_batch)
    check_provider(provider)
    folder = make_provider_folder(bundle, provider)
    try:
        return Session(bundle.graph_path, provider, request.threads, provider_options=options)
    except ProviderError:
        with suppress(OSError):
            folder.rmdir()  # where nothing was built
        raise


_OPENERS: dict[str, Callable[[Bundle, OpenRequest], Session]] = {
    "cpu": _open_on_cpu,
    "cuda": _open_on_gpu,
    "tensorrt": _open_by_tensorrt,
    "tensorrt-rtx": _open_by_tensorrt,
}
