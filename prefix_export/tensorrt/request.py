"""The options of an engine, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefix_export.errors import EngineError
from prefix_runtime import Bundle
from prefix_runtime.backends.tensorrt.library import Library
from prefix_runtime.backends.tensorrt.profile import Profile, limits, profiles
from prefix_runtime.backends.tensorrt.tensorrt_engine_file import BACKENDS, tensorrt_engines_folder

RTX = "tensorrt-rtx"
PRECISIONS = ("fp16", "bf16")
"""Not int8: a graph with int8 weights has its own scales, and TensorRT then computes in the graph's types."""


@dataclass(frozen=True)
class TensorRTEngineRequest:
    """What to build.

    Attributes:
        bundle: the bundle's folder.
        output: the folder for the engine, created if necessary; None takes `tensorrt` in the bundle.
        backend: "tensorrt-rtx", which needs no GPU, or "tensorrt", which builds for this machine's GPU.
        compute_capabilities: the compute capabilities of the GPUs, such as "8.6", for TensorRT for RTX. None lets the
            library choose: 8.0 and above.
        max_batch: the maximum number of rows that decode together; None takes 8.
        max_prompt: the maximum number of tokens in a prompt; None takes the model's room.
        max_prefix: the maximum number of positions of a fed prefix; None takes the longest task's.
        precision: "fp16" or "bf16" lets TensorRT before version 11 also compute in that type. None computes in the
            graph's types.
        is_refittable: whether the engine's prefixes can be replaced later.
        is_version_compatible: whether to set the flags that let later versions of the library run the engine. No later
            version was tested.
        timing_cache: a file of TensorRT's measurements, read and written; None for none.
    """

    bundle: Path
    output: Path | None = None
    backend: str = RTX
    compute_capabilities: tuple[str, ...] | None = None
    max_batch: int | None = None
    max_prompt: int | None = None
    max_prefix: int | None = None
    precision: str | None = None
    is_refittable: bool = False
    is_version_compatible: bool = False
    timing_cache: Path | None = None

    def options(self) -> dict[str, Any]:
        """The options that change the engine, without the sizes, which are in its profiles."""
        return {
            "compute_capabilities": list(self._capabilities),
            "precision": self.precision,
            "is_refittable": self.is_refittable,
            "is_version_compatible": self.is_version_compatible,
        }

    @property
    def name(self) -> str:
        """The engine's name: the backend and the compute capabilities."""
        return "-".join([self.backend, *self._capabilities])

    @property
    def _capabilities(self) -> list[str]:
        """The compute capabilities in ascending order, so that the order of options does not change the engine."""
        return sorted(self.compute_capabilities or (), key=lambda capability: tuple(map(int, capability.split("."))))


@dataclass(frozen=True)
class CheckedRequest:
    """A request that only the library can still refuse: its bundle, the ranges of sizes, and the engine's folder."""

    bundle: Bundle
    ranges: tuple[Profile, ...]
    folder: Path


def check_request(request: TensorRTEngineRequest) -> CheckedRequest:
    """Check a request without importing TensorRT or onnx.

    Raises:
        EngineError: an option is wrong; the message names it and its choices.
        PrefixRuntimeError: there is no bundle, or a limit is out of range.
    """
    if request.backend not in BACKENDS:
        raise EngineError(f"backend: expected one of {', '.join(BACKENDS)}, found {request.backend!r}")
    bundle = Bundle.open(request.bundle)
    chosen = limits(bundle.manifest, request.max_batch, request.max_prompt, request.max_prefix)
    if request.is_refittable and bundle.manifest.mode != "bake":
        raise EngineError(
            "refit: expected a bundle whose graph holds prefixes (--mode bake), found one that feeds them"
        )
    listed = request.compute_capabilities or ()
    if len(set(listed)) < len(listed):
        raise EngineError(f"compute capability: expected each once, found {', '.join(listed)}")
    _check_precision(request.precision, bundle)
    folder = request.output or tensorrt_engines_folder(bundle)
    _check_places(folder, request.timing_cache)
    return CheckedRequest(bundle, profiles(bundle.manifest, chosen), folder)


def _check_precision(precision: str | None, bundle: Bundle) -> None:
    if precision is None:
        return
    if precision not in PRECISIONS:
        hint = "; for weights of 8 bits build the bundle with --precision int8" if precision == "int8" else ""
        raise EngineError(f"precision: expected one of {', '.join(PRECISIONS)}, found {precision!r}{hint}")
    if bundle.manifest.precision == "int8":
        raise EngineError(
            "precision: expected none for a graph whose weights have 8 bits, because TensorRT computes in its types, "
            f"found {precision!r}"
        )


def _check_places(folder: Path, timing_cache: Path | None) -> None:
    for option, path in (("output", folder), ("timing cache", timing_cache)):
        if path is not None and not path.absolute().parent.is_dir():
            raise EngineError(f"{option}: {path.absolute().parent}: expected a folder to write into, found none")
    if folder.exists() and not folder.is_dir():
        raise EngineError(f"output: {folder}: expected a folder, or nothing there yet, found a file")


def check_choices(request: TensorRTEngineRequest, library: Library) -> None:
    """Refuse options that the library does not offer.

    Raises:
        EngineError: an option is not offered; the message names it and its choices.
    """
    _check_gpu(request, library)
    offered = capabilities(library)
    for capability in request.compute_capabilities or ():
        if not offered:
            raise EngineError(
                f"compute capability: expected none, as {library.name} builds for the GPU of this machine, found "
                f"{capability}; take --backend {RTX}, or build on that GPU"
            )
        if capability not in offered:
            raise EngineError(
                f"compute capability: expected one of {', '.join(offered)}, which {library.name} builds for, found "
                f"{capability!r}"
            )
    if request.precision is not None and not hasattr(library.api.BuilderFlag, request.precision.upper()):
        raise EngineError(
            f"precision {request.precision}: expected none, as {library.name} computes in the types of the graph; "
            "build the bundle with --precision fp16 instead"
        )


def check_timing_cache(timing_cache: Path | None, library: Library) -> None:
    """Refuse a timing cache that the library would not use.

    Raises:
        EngineError: TensorRT for RTX measures nothing while it builds; leave the timing cache out.
    """
    if timing_cache is not None and library.backend == RTX:
        raise EngineError(
            f"timing cache: expected none, as {library.name} measures nothing while it builds, found {timing_cache}"
        )


def _check_gpu(request: TensorRTEngineRequest, library: Library) -> None:
    if library.has_gpu:
        return
    if library.backend != RTX:
        raise EngineError(
            f"{library.name}: expected a GPU on this machine, which it builds for, found none; take --backend {RTX}, "
            "which needs none"
        )
    if request.is_refittable:
        raise EngineError(
            f"refit: {library.name} prepares weights that may be replaced on a GPU: expected one on this machine, "
            "found none; build there, or feed prefixes, which need no refit (--mode feed)"
        )


def capabilities(library: Library) -> dict[str, Any]:
    """The compute capabilities, such as "8.6", for which a library builds without a GPU, and its names for them."""
    listed = getattr(library.api, "ComputeCapability", None)
    members = getattr(listed, "__members__", {})
    names = [name for name in members if name.startswith("SM")]
    return {f"{name[2:-1]}.{name[-1]}": members[name] for name in sorted(names, key=lambda name: int(name[2:]))}
