"""How a bundle's graph is run: the interface of a backend, and which backend a provider's name stands for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Self, cast

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.cache.cache import Cache
from prefix_runtime.cache.pool import CAPACITY_STEP
from prefix_runtime.errors import ProviderError, RequestError
from prefix_runtime.prefix.prefix import Prefix

from .options import TENSORRT_ENGINE, Cuda

if TYPE_CHECKING:
    from .gpu.device import Device


@dataclass(frozen=True)
class OpenRequest:
    """What a backend is asked for when it opens a bundle; see `engine.load`.

    Attributes:
        provider: its name, or a `Cuda`.
        threads: CPU threads of one run; None leaves the choice to the backend.
        max_batch: prompts of a list that decode together.
        only_own: open no graph that was kept, which has no hashes.
        prepare: keep the graph first, as the backend packs it, where none was kept.
    """

    provider: str | Cuda
    threads: int | None = None
    max_batch: int = 1
    only_own: bool = False
    prepare: bool | None = None

    @property
    def name(self) -> str:
        """The provider's name."""
        return _name(self.provider)

    @property
    def cuda(self) -> Cuda:
        """The GPU that was chosen, or the first one."""
        return self.provider if isinstance(self.provider, Cuda) else Cuda()


@dataclass(frozen=True)
class BackendLimits:
    """What a backend allows.

    Attributes:
        rows: of a batch, at the most; None for any number.
        capacity_step: positions by which its caches grow.
    """

    rows: int | None = None
    capacity_step: int = CAPACITY_STEP


class Backend(ABC):
    """A bundle, opened by something that runs its graph. May be used by many threads at once.

    Attributes:
        device: the GPU that it runs on, or None.
        limits: what it allows.
    """

    device: Device | None = None
    limits: BackendLimits = BackendLimits()

    @classmethod
    @abstractmethod
    def open(cls, bundle: Bundle, request: OpenRequest) -> Self:
        """Open a bundle's graph.

        Raises:
            ProviderError: it cannot be opened with this provider.
        """

    @abstractmethod
    def make_cache(self, rows: int, capacity: int, task_id: Callable[[Prefix], int] | None = None) -> Cache:
        """A cache of so many rows, with room for so many positions in each.

        Args:
            rows: of the batch.
            capacity: positions of each row, the prefix's included where it is fed.
            task_id: the place of a prefix in a graph that holds them; None where the graph holds none.
        """

    def forget(self, prefix: Prefix) -> None:  # noqa: B027  # most keep nothing of a prefix
        """Drop what is kept of a prefix beside the caches. Takes no lock: finalisers call it."""


_PACKAGE: str = __name__.rpartition(".")[0]
_BACKENDS: dict[str, str | type[Backend]] = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime",
    "tensorrt": "onnxruntime",
    "tensorrt-rtx": "onnxruntime",
    TENSORRT_ENGINE: "tensorrt",
}
"""By the provider's name: the backend, or the folder whose `backend.py` has it as `BACKEND`."""


def register(provider: str, backend: type[Backend]) -> None:
    """Let a provider's name stand for a backend of the caller's.

    Raises:
        ProviderError: the name is taken.
    """
    if provider in _BACKENDS:
        raise ProviderError(f"provider: expected a name that is not taken, found {provider!r}")
    _BACKENDS[provider] = backend


def open_backend(bundle: Bundle, request: OpenRequest) -> Backend:
    """Open a bundle's graph by the backend that the provider's name stands for.

    Raises:
        ProviderError: the provider is unknown or does not run this graph, or the backend cannot open it.
        RequestError: what is to be kept would not be opened.
        BundleIntegrityError, OSError: the graph that is to be kept is damaged, or cannot be written.
    """
    check_fits(request.provider, bundle)
    if request.prepare and (request.provider != "cpu" or request.only_own):
        is_cpu = request.provider == "cpu"
        actual = "verify, which opens the bundle's own graph" if is_cpu else f"provider {request.provider!r}"
        raise RequestError(f"prepare: expected provider 'cpu' without verify, found {actual}; leave it out")
    return _backend(request.name).open(bundle, request)


def check_known(provider: object) -> None:
    """Refuse a name that is no provider's; whether it is installed only its backend can say.

    Raises:
        ProviderError: the message lists the names.
    """
    if not isinstance(provider, str) or provider not in _BACKENDS:
        raise ProviderError(f"provider: expected one of {', '.join(_BACKENDS)}, found {provider!r}")


def check_fits(provider: str | Cuda, bundle: Bundle) -> None:
    """Refuse a provider that is unknown or does not run a bundle's graph.

    Raises:
        ProviderError: choose another provider, or build the bundle for this one; the message says which.
    """
    name, manifest = _name(provider), bundle.manifest
    check_known(name)
    if name == "cuda" and manifest.flavour == "fast" and manifest.target != "cuda":
        raise ProviderError(
            f"{bundle.root}: provider: expected cpu for a bundle of target {manifest.target}, found cuda; build it "
            "with --target cuda for a GPU"
        )
    if manifest.cache == "bf16" and name == "cpu":
        raise ProviderError(
            f"{bundle.root}: provider: expected cuda for a bundle in bfloat16, which onnxruntime does not run on a "
            "CPU, found 'cpu'; build it with --precision fp16 for both"
        )


def _name(provider: str | Cuda) -> str:
    return "cuda" if isinstance(provider, Cuda) else provider


def _backend(name: str) -> type[Backend]:
    backend = _BACKENDS[name]
    if isinstance(backend, str):
        backend = cast(type[Backend], import_module(f"{_PACKAGE}.{backend}.backend").BACKEND)
    return backend
