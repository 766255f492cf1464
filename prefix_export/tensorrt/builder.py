"""TensorRT's builder: configured, run where it can be interrupted, its phases told."""

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
"""Phases within phases that are told; below, there are thousands of some milliseconds."""


def configure(request: TensorRTEngineRequest, builder: Any, library: Library) -> Any:
    """A configuration (`IBuilderConfig`) of what was chosen.

    Raises:
        EngineError: the library does not take it.
    """
    api, config = library.api, builder.create_builder_config()
    flags = [request.precision.upper()] if request.precision else []
    if request.is_refittable:
        flags.append("REFIT_INDIVIDUAL")  # of all weights the prefixes' alone, so that the others may be folded
    if request.is_version_compatible:
        # What older or newer versions run without it is not in the wheels of TensorRT for RTX.
        flags += ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]
    for flag in flags:
        if not hasattr(api.BuilderFlag, flag):
            raise EngineError(f"{library.name}: expected one that knows {flag}, found none; take a later version")
        config.set_flag(getattr(api.BuilderFlag, flag))
    if request.compute_capabilities:
        offered = capabilities(library)
        config.num_compute_capabilities = len(request.compute_capabilities)
        for place, wanted in enumerate(request.compute_capabilities):
            if not config.set_compute_capability(offered[wanted], place):
                raise EngineError(f"compute capability: expected one that {library.name} takes, found {wanted}")
    return config


def use_timing_cache(path: Path, config: Any, library: Library) -> None:
    """Let a build begin with what another one measured; a file that is not there is an empty one.

    Raises:
        EngineError: the file is none, or of another version or GPU.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(
            f"{path}: expected a timing cache of {library.name}, found none {library.complaint()}; remove the file"
        )


def save_timing_cache(path: Path, config: Any) -> None:
    """Keep what a build measured."""
    cache = config.get_timing_cache()
    if cache is not None:
        write_file_atomically(path, bytes(cache.serialize()))


def run(builder: Any, network: Any, config: Any, library: Library, progress: Progress) -> bytes:
    """The serialized engine of a network.

    The builder runs in a thread of its own, which lets go of the interpreter, so that an interrupt reaches the caller
    at once: the builder is told to stop, and when it has the interrupt goes on.

    Raises:
        EngineError: TensorRT cannot build it.
        BaseException: whatever interrupts the caller.
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
    """A build, to be called in a thread.

    Attributes:
        done: set at its end.
        cancelled: set to stop it.
        plan: the serialized engine; None where there is none.
        error: that was raised.
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
        """Tells the outer phases, and stops the build where it is cancelled."""

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
    """What a person can do about a build that failed, as far as TensorRT's own words tell."""
    lines = " ".join(library.logger.lines)
    said = library.complaint()
    if "Turing" in lines and "FP32" in lines:
        return (
            f"compute capability 7.5: expected a graph in float16, as {library.name} multiplies no float32 matrices "
            f"for it, found float32; build the bundle with --precision fp16 {said}"
        )
    return f"{library.name} cannot build an engine of the graph {said}"
