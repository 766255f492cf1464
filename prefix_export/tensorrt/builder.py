"""Configure and run TensorRT's builder, so that it reports its phases and can be interrupted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from prefix_export.errors import EngineError
from prefix_export.progress import Progress
from prefix_runtime.backends.tensorrt.library import Library
from prefix_runtime.files import write_file_atomically

from .request import TensorRTEngineRequest, capabilities

_DEPTH = 2
"""The deepest level of nested phases that is reported; deeper, there are thousands of a few milliseconds each."""


def configure(request: TensorRTEngineRequest, builder: Any, library: Library) -> Any:
    """A configuration (`IBuilderConfig`) with the request's options.

    Raises:
        EngineError: the library does not support an option; the message names it.
    """
    api, config = library.api, builder.create_builder_config()
    flags = [request.precision.upper()] if request.precision else []
    if request.is_refittable:
        flags.append("REFIT_INDIVIDUAL")  # only the prefixes, so that the builder may fold other weights
    if request.is_version_compatible:
        # The wheels of TensorRT for RTX do not contain the lean runtime.
        flags += ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]
    for flag in flags:
        if not hasattr(api.BuilderFlag, flag):
            raise EngineError(f"{library.name}: expected one that knows {flag}, found none; take a later version")
        config.set_flag(getattr(api.BuilderFlag, flag))
    if request.compute_capabilities:
        offered = capabilities(library)
        config.num_compute_capabilities = len(request.compute_capabilities)
        for place, capability in enumerate(request.compute_capabilities):
            if not config.set_compute_capability(offered[capability], place):
                raise EngineError(f"compute capability: expected one that {library.name} takes, found {capability}")
    return config


def use_timing_cache(path: Path, config: Any, library: Library) -> None:
    """Start a build with the measurements of an earlier one; a missing file counts as empty.

    Raises:
        EngineError: the file is not a timing cache, or is from another version or GPU; remove it.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(
            f"{path}: expected a timing cache of {library.name}, found none {library.complaint()}; remove the file"
        )


def save_timing_cache(path: Path, config: Any) -> None:
    """Save the measurements of a build."""
    cache = config.get_timing_cache()
    if cache is not None:
        write_file_atomically(path, bytes(cache.serialize()))


def run(builder: Any, network: Any, config: Any, library: Library, progress: Progress) -> bytes:
    """The serialized engine of a network.

    The builder runs in a separate thread without Python's global lock, so the caller receives an interrupt at once. The
    caller then cancels the builder, waits until it has stopped, and raises the interrupt again.

    Raises:
        EngineError: TensorRT cannot build the engine; the message gives its reason.
        BaseException: the exception that interrupted the caller.
    """
    work = _Work(builder, network, config, library, progress)
    thread = threading.Thread(target=work, name="tensorrt", daemon=True)
    thread.start()
    try:
        while not work.done.wait(0.1):
            pass
    except BaseException:
        work.cancelled.set()
        work.done.wait()
        raise
    if work.error is not None:
        raise work.error
    if work.plan is None:
        raise EngineError(_why(library))
    return work.plan


class _Work:
    """A build that a thread calls.

    Attributes:
        done: is set when the build has ended.
        cancelled: set it to stop the build.
        plan: the serialized engine; None if the build failed.
        error: the exception of the build, or None.
    """

    def __init__(self, builder: Any, network: Any, config: Any, library: Library, progress: Progress) -> None:
        self._builder, self._network, self._config, self._library = builder, network, config, library
        self.done, self.cancelled = threading.Event(), threading.Event()
        self.plan: bytes | None = None
        self.error: BaseException | None = None
        self._monitor = _monitor(library.api, self.cancelled, progress)

    def __call__(self) -> None:
        try:
            self._config.progress_monitor = self._monitor  # TensorRT keeps no reference to it
            self._library.logger.lines.clear()
            plan = self._builder.build_serialized_network(self._network, self._config)
            self.plan = None if plan is None else bytes(plan)
        except BaseException as error:  # noqa: BLE001  # the caller's thread raises it
            self.error = error
        finally:
            self.done.set()


def _monitor(api: Any, cancelled: threading.Event, progress: Progress) -> Any:
    class Monitor(api.IProgressMonitor):  # type: ignore[misc]  # the base class is the bindings'
        """Reports the outer phases, and stops a cancelled build."""

        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self._depths: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            depth = self._depths.get(parent_phase, 0) + 1 if parent_phase else 0
            self._depths[phase_name] = depth
            if depth <= _DEPTH:
                progress.phase(f"TensorRT: {phase_name[:1].lower()}{phase_name[1:]}")

        def phase_finish(self, phase_name: str) -> None:
            self._depths.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:  # noqa: ARG002
            return not cancelled.is_set()

    return Monitor()


def _why(library: Library) -> str:
    """The message for a failed build, with advice if TensorRT's own words allow it."""
    lines = " ".join(library.logger.lines)
    complaint = library.complaint()
    if "Turing" in lines and "FP32" in lines:
        return (
            f"compute capability 7.5: expected a graph in float16, as {library.name} multiplies no float32 matrices "
            f"for it, found float32; build the bundle with --precision fp16 {complaint}"
        )
    return f"{library.name} cannot build an engine of the graph {complaint}"
