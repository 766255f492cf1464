"""TensorRT's own API as a backend: what `prefix-export tensorrt` built of a bundle's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from prefix_runtime.backends.registry import Backend, BackendLimits, OpenRequest
from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.cache.cache import Cache
from prefix_runtime.prefix.prefix import Prefix

from .cache import TensorRTCache
from .session import TensorRTEngineSession, open_tensorrt_engine


class TensorRT(Backend):
    """A bundle whose TensorRT engine runs on a GPU.

    Args:
        bundle: what the engine is of.
        session: of the engine.
    """

    def __init__(self, bundle: Bundle, session: TensorRTEngineSession) -> None:
        self._session, self.device = session, session.device
        self.limits = BackendLimits(rows=session.limits.batch)
        self._geometry, self._format = bundle.manifest.geometry, bundle.cache_format

    @classmethod
    def open(cls, bundle: Bundle, request: OpenRequest) -> Self:
        """See `Backend`."""
        return cls(bundle, open_tensorrt_engine(bundle, request.cuda))

    def make_cache(self, rows: int, capacity: int, task_id: Callable[[Prefix], int] | None = None) -> Cache:
        """See `Backend`."""
        return TensorRTCache(self._session, self._geometry, rows, capacity, cache_format=self._format, task_id=task_id)


BACKEND = TensorRT
