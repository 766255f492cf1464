"""Build a serialized engine and its record from a bundle's graph."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from prefix_export.errors import EngineError
from prefix_export.progress import SILENT, Progress
from prefix_runtime import Bundle, BundleIntegrityError
from prefix_runtime.backends.tensorrt.library import Library, check_profiles, check_tensors, gpu_capability
from prefix_runtime.backends.tensorrt.profile import Profile, Tensor, tensors
from prefix_runtime.backends.tensorrt.tensorrt_engine_file import (
    TensorRTEngineRecord,
    add_tensorrt_engine,
    check_tensorrt_engine,
    graph_hash,
    read_tensorrt_engines,
    recipe_hash,
)
from prefix_runtime.bundle.manifest import FileEntry

from . import network as networks
from .builder import configure, run, save_timing_cache, use_timing_cache
from .refit import mark_prefixes, prefix_weights
from .request import RTX, TensorRTEngineRequest, check_choices, check_request, check_timing_cache

_NOT_YET = FileEntry("", 0, "0" * 64)
Tensors = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class TensorRTEngineResult:
    """The result of a build.

    Attributes:
        folder: the engine's folder.
        record: the engine's record.
        seconds: the duration of the build; 0 if an existing engine was up to date.
    """

    folder: Path
    record: TensorRTEngineRecord
    seconds: float


def build_tensorrt_engine(
    request: TensorRTEngineRequest, progress: Progress = SILENT, library: Library | None = None
) -> TensorRTEngineResult:
    """Build a serialized engine from a bundle's graph, and record it. An engine that is up to date is kept.

    Args:
        request: what to build.
        progress: receives TensorRT's phases, in another thread.
        library: TensorRT; None imports the backend's.

    Raises:
        EngineError: TensorRT does not support the graph or an option; the message names it.
        PrefixRuntimeError: there is no bundle, its graph is damaged, a limit is out of range, or the library is not
            installed.
        OSError: the disk is full or not writable; the folder is unchanged.
    """
    started = time.perf_counter()
    checked = check_request(request)
    bundle, ranges, folder = checked.bundle, checked.ranges, checked.folder
    library = library or Library(request.backend)
    check_choices(request, library)
    check_timing_cache(request.timing_cache, library)
    bundle.verify_graph()  # the graph's hash identifies the engine
    if (known := _up_to_date(folder, request, bundle, library, ranges)) is not None:
        return TensorRTEngineResult(folder, known, 0.0)
    record, plan = _build(request, bundle, library, ranges, progress)
    progress.phase("write the engine")
    folder.mkdir(exist_ok=True)
    return TensorRTEngineResult(folder, add_tensorrt_engine(folder, record, plan), time.perf_counter() - started)


def _up_to_date(
    folder: Path, request: TensorRTEngineRequest, bundle: Bundle, library: Library, ranges: tuple[Profile, ...]
) -> TensorRTEngineRecord | None:
    """The undamaged engine with the same recipe; None if there is none."""
    recipe = recipe_hash(graph_hash(bundle.manifest), library.backend, library.version, request.options(), ranges)
    capabilities = _capabilities_here(library)
    for record in read_tensorrt_engines(folder):
        recorded = recipe_hash(record.graph, record.backend, record.version, record.options, record.profiles)
        if recorded == recipe and capabilities in ((), record.compute_capabilities):
            try:
                check_tensorrt_engine(folder, record, bundle)
            except BundleIntegrityError:
                return None  # missing or damaged: build it again
            return record
    return None


def _build(
    request: TensorRTEngineRequest,
    bundle: Bundle,
    library: Library,
    ranges: tuple[Profile, ...],
    progress: Progress,
) -> tuple[TensorRTEngineRecord, bytes]:
    expected = tensors(bundle.manifest)
    progress.phase("parse the graph")
    builder = library.api.Builder(library.logger)
    network, parser = networks.parse(bundle, builder, library, is_strongly_typed=request.precision is None)
    where = str(bundle.graph_path)
    network_tensors = networks.tensors(network)
    check_tensors(expected, network_tensors, where)
    config = configure(request, builder, library)
    network_profiles = networks.add_profiles(ranges, builder, config)
    check_profiles(ranges, network_profiles, where)
    refittable = prefix_weights(bundle) if request.is_refittable else {}
    mark_prefixes(network, refittable)
    if request.timing_cache is not None:
        use_timing_cache(request.timing_cache, config, library)
    plan = run(builder, network, config, library, progress)
    del parser  # it holds the weights
    if request.timing_cache is not None:
        save_timing_cache(request.timing_cache, config)
    progress.phase("read the engine back")
    read_back = _read_back(plan, library, network_tensors, network_profiles)
    check_tensors(expected, read_back.tensors, "the engine")
    check_profiles(ranges, read_back.profiles, "the engine")
    inputs, outputs = read_back.tensors
    record = TensorRTEngineRecord(
        name=request.name,
        file=_NOT_YET,
        backend=library.backend,
        version=library.version,
        compute_capabilities=request.compute_capabilities or _capabilities_here(library),
        graph=graph_hash(bundle.manifest),
        options=request.options(),
        profiles=read_back.profiles,
        inputs=inputs,
        outputs=outputs,
        refittable=refittable,
        read_back=read_back.source,
    )
    return record, plan


def _capabilities_here(library: Library) -> tuple[str, ...]:
    """The compute capability of this machine's GPU, for which TensorRT builds; empty for TensorRT for RTX."""
    capability = gpu_capability(0) if library.backend != RTX else None
    return () if capability is None else (capability,)


@dataclass(frozen=True)
class _ReadBack:
    tensors: Tensors
    profiles: tuple[Profile, ...]
    source: str


def _read_back(plan: bytes, library: Library, network_tensors: Tensors, profiles: tuple[Profile, ...]) -> _ReadBack:
    """The inputs, outputs and profiles of an engine: from itself on a GPU that runs it, otherwise from its network."""
    for tensor in (*network_tensors[0], *network_tensors[1]):
        if tensor.name.encode() not in plan:
            raise EngineError(f"the engine: expected a tensor named {tensor.name}, found none")
    engine = library.open(plan) if library.has_gpu else None
    if engine is None:
        return _ReadBack(network_tensors, profiles, "network")
    names = tuple(profile.name for profile in profiles)
    return _ReadBack(library.tensors(engine), library.profiles(engine, names), "engine")


def find_tensorrt_engine(folder: Path, bundle: Bundle, name: str | None = None) -> TensorRTEngineRecord:
    """The engine in a folder, checked against the bundle.

    Args:
        folder: the folder of engines.
        bundle: the bundle.
        name: the engine's name; None takes the only engine.

    Raises:
        EngineError: there is no engine, or there are several and no name; the message says what to do.
        BundleError: the engine was built from another graph; build it again.
        BundleIntegrityError: the engine's file is missing or damaged; build it again.
    """
    records = read_tensorrt_engines(folder)
    fitting = [record for record in records if name in (None, record.name)]
    if len(fitting) != 1:
        listed = ", ".join(record.name for record in records)
        expected = "one engine" if name is None else f"an engine {name!r}"
        advice = "name one of them" if records else f"build it with: prefix-export tensorrt {bundle.root}"
        raise EngineError(f"{folder}: expected {expected}, found {listed or 'none'}; {advice}")
    bundle.verify_graph()
    check_tensorrt_engine(folder, fitting[0], bundle)
    return fitting[0]
