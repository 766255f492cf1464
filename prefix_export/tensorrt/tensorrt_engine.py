"""The recipe: a bundle's graph to a serialized engine and its record."""

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
    """What was built.

    Attributes:
        folder: that the engine lies in.
        record: of it.
        seconds: that the whole took; 0 where the engine that was there is up to date.
    """

    folder: Path
    record: TensorRTEngineRecord
    seconds: float


def build_tensorrt_engine(
    request: TensorRTEngineRequest, progress: Progress = SILENT, library: Library | None = None
) -> TensorRTEngineResult:
    """Parse a bundle's graph, build a serialized engine for the sizes that its manifest implies, and record it.

    Args:
        request: what to build.
        progress: told of TensorRT's phases, in a thread of its own.
        library: TensorRT; None finds the backend's.

    Raises:
        EngineError: TensorRT does not take the graph or what was chosen.
        PrefixRuntimeError: no bundle, a damaged graph, a limit out of its range, no such library.
        OSError: the disk is full or not writable; the folder is as it was.
    """
    started = time.perf_counter()
    checked = check_request(request)
    bundle, ranges, folder = checked.bundle, checked.ranges, checked.folder
    library = library or Library(request.backend)
    check_choices(request, library)
    check_timing_cache(request.timing_cache, library)
    bundle.verify_graph()  # an engine is known by the graph's hash
    if (known := _up_to_date(folder, request, bundle, library, ranges)) is not None:
        return TensorRTEngineResult(folder, known, 0.0)
    record, plan = _build(request, bundle, library, ranges, progress)
    progress.phase("write the engine")
    folder.mkdir(exist_ok=True)
    return TensorRTEngineResult(folder, add_tensorrt_engine(folder, record, plan), time.perf_counter() - started)


def _up_to_date(
    folder: Path, request: TensorRTEngineRequest, bundle: Bundle, library: Library, ranges: tuple[Profile, ...]
) -> TensorRTEngineRecord | None:
    """The engine of this very recipe, where it is there and whole."""
    wanted = recipe_hash(graph_hash(bundle.manifest), library.backend, library.version, request.options(), ranges)
    here = _capabilities_here(library)
    for record in read_tensorrt_engines(folder):
        recipe = recipe_hash(record.graph, record.backend, record.version, record.options, record.profiles)
        if recipe == wanted and here in ((), record.compute_capabilities):
            try:
                check_tensorrt_engine(folder, record, bundle)
            except BundleIntegrityError:
                return None  # missing or damaged: to be built anew
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
    given = networks.tensors(network)
    check_tensors(expected, given, where)
    config = configure(request, builder, library)
    kept = networks.add_profiles(ranges, builder, config)
    check_profiles(ranges, kept, where)
    refittable = prefix_weights(bundle) if request.is_refittable else {}
    mark_prefixes(network, refittable)
    if request.timing_cache is not None:
        use_timing_cache(request.timing_cache, config, library)
    plan = run(builder, network, config, library, progress)
    del parser  # it held the weights
    if request.timing_cache is not None:
        save_timing_cache(request.timing_cache, config)
    progress.phase("read the engine back")
    read_back = _read_back(plan, library, given, kept)
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
    """What an engine runs on that is built for no compute capability by name: this machine's GPU's, of TensorRT."""
    capability = gpu_capability(0) if library.backend != RTX else None
    return () if capability is None else (capability,)


@dataclass(frozen=True)
class _ReadBack:
    tensors: Tensors
    profiles: tuple[Profile, ...]
    source: str


def _read_back(plan: bytes, library: Library, given: Tensors, kept: tuple[Profile, ...]) -> _ReadBack:
    """What an engine takes and gives: read from it on a GPU that runs it, else from the network it was built of."""
    for tensor in (*given[0], *given[1]):
        if tensor.name.encode() not in plan:
            raise EngineError(f"the engine: expected a tensor named {tensor.name}, found none")
    engine = library.open(plan) if library.has_gpu else None
    if engine is None:
        return _ReadBack(given, kept, "network")
    names = tuple(profile.name for profile in kept)
    return _ReadBack(library.tensors(engine), library.profiles(engine, names), "engine")


def find_tensorrt_engine(folder: Path, bundle: Bundle, name: str | None = None) -> TensorRTEngineRecord:
    """The engine of a folder, by its name where there are several; it is of the bundle's graph, and whole.

    Raises:
        EngineError: there is none, or several and no name.
        BundleError, BundleIntegrityError: it is stale, or damaged.
    """
    records = read_tensorrt_engines(folder)
    fitting = [record for record in records if name in (None, record.name)]
    if len(fitting) != 1:
        listed = ", ".join(record.name for record in records)
        wanted = "one engine" if name is None else f"an engine {name!r}"
        advice = "name one of them" if records else f"build it with: prefix-export tensorrt {bundle.root}"
        raise EngineError(f"{folder}: expected {wanted}, found {listed or 'none'}; {advice}")
    bundle.verify_graph()
    check_tensorrt_engine(folder, fitting[0], bundle)
    return fitting[0]
