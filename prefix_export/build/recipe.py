"""The recipe: a base model and trained prefixes to a bundle, by steps that each take what the step before returns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prefix_export import targets
from prefix_export.errors import ModelError
from prefix_export.models import BaseModel, load_base_model
from prefix_export.models.base_model import drop_weights
from prefix_export.prefixes.reference import SourcedPrefixes
from prefix_export.progress import SILENT, PhaseTimes, Progress
from prefix_export.quantize.modules import QuantizedModel
from prefix_export.quantize.options import quantization
from prefix_export.tokenizers.held_out import read_held_out
from prefix_export.verify.all_tasks import (
    check_can_run,
    compare_all,
    observe_all,
)
from prefix_export.verify.parity import TaskParity
from prefix_export.verify.quality import TaskQuality
from prefix_runtime import Bundle
from prefix_runtime.bundle.staging import staged
from prefix_runtime.prefix.cache_format import CacheFormat

from .folding import load_and_fold
from .plan import arithmetic
from .request import BuildRequest, check_request, check_sources
from .rounding import conditions, read_in_float, round_weights
from .writing import certify, write_bundle


@dataclass(frozen=True)
class BuildResult:
    """What `build` made.

    Attributes:
        bundle: the bundle on disk.
        parity: how the graph compares with the source framework, by task; None stands for the bare model. Empty without
            `verify`.
        quality: what quantizing costs, by task. Empty if nothing was quantized, or without `verify`.
        seconds: the time of the whole build.
        warnings: what the user should know, one line each.
        phase_seconds: the time of each phase ("load", "export", …), in order.
    """

    bundle: Bundle
    parity: Mapping[str | None, TaskParity]
    quality: Mapping[str | None, TaskQuality]
    seconds: float
    warnings: tuple[str, ...] = field(default=())
    phase_seconds: Mapping[str, float] = field(default_factory=dict)


def build(
    request: BuildRequest,
    progress: Progress = SILENT,
    load: Callable[[str], BaseModel] | None = None,
) -> BuildResult:
    """Fold the prefixes, export the model, compare both with the source framework, and write the bundle.

    If an error is raised, nothing is left behind.

    Args:
        request: what to build.
        progress: follows the build; see `Progress`. Default: silent.
        load: makes the base model from its name. Default: loads it from a folder, a file or the Hub.

    Returns:
        The bundle, how it compares with the source framework, and warnings.

    Raises:
        ModelError: the base model cannot be found, loaded or exported.
        CheckpointError: a checkpoint cannot be read as a prefix.
        ExportError: the request contradicts itself, or the graph cannot be made.
        ParityError: the graph disagrees with the source framework.
        PrefixRuntimeError: the output exists, or a prefix or a task's name cannot be used.
        OSError: the disk is full or not writable.

    Examples:
        >>> request = BuildRequest("openai-community/gpt2", {"json": Path("adapter")}, Path("bundle"))
        >>> build(request).bundle.tasks  # doctest: +SKIP
        ('json',)
    """
    started = time.perf_counter()
    times = PhaseTimes(progress)
    checked = check_request(request)
    if load is None:
        check_sources(checked.request)
    if checked.request.verify:
        check_can_run(checked.plan.precision)
    folded = load_and_fold(checked, load or load_base_model, times)
    rounded = round_weights(read_in_float(folded, times), times)
    with staged(request.output) as folder:
        written = write_bundle(rounded, folder, times)
        # The engine needs the room that the model takes.
        drop_weights(folded.base.model)
        del folded, rounded
        gc.collect()
        parity, quality = certify(written, times)
        times.phase("write to the disk")
    times.end()
    seconds = time.perf_counter() - started
    return BuildResult(Bundle.open(request.output), parity, quality, seconds, written.warnings, times.seconds)


def verify_against(bundle: Bundle, model: str, progress: Progress = SILENT) -> dict[str | None, TaskParity]:
    """Compare a bundle's graph with a base model, under every task and without.

    Args:
        bundle: the bundle.
        model: the base model: a Hub id, a folder or a GGUF file.
        progress: follows the comparison. Default: silent.

    Returns:
        The result of each task. None stands for the bare model.

    Raises:
        ParityError: they differ.
        ModelError: the model cannot be loaded, or it is not the one that the bundle was built from.
    """
    progress.phase("load", detail=model)
    base = load_base_model(model)
    if base.fingerprint != bundle.manifest.model.fingerprint:
        raise ModelError(
            f"model {model!r}: expected the bundle's base model {bundle.manifest.model.name!r}, found other weights "
            f"(fingerprint {base.fingerprint[:20]}…, not {bundle.manifest.model.fingerprint[:20]}…)"
        )
    manifest = bundle.manifest
    by_output = targets.TARGETS[manifest.target].has_output_scales
    if settings := quantization(
        manifest.precision, manifest.block_size, manifest.quantizer or "rtn", by_output=by_output
    ):
        QuantizedModel(base.model, settings, progress)
    prefixes = {task: bundle.prefix(task) for task in bundle.tasks}
    plan = targets.plan(manifest.target, manifest.mode, manifest.precision, manifest.cache, None, adapters=None)
    texts = {
        task: read_held_out(None, base, prefixes[task] if task else None, manifest.max_length)
        for task in conditions(manifest.mode, prefixes)
    }
    scales = CacheFormat.of_bundle(bundle.root, manifest.cache, manifest.geometry).scales
    folded = SourcedPrefixes(prefixes, dict.fromkeys(prefixes))
    expected = observe_all(
        base, folded, texts, arithmetic(plan, scales), max_length=manifest.max_length, progress=progress
    )
    return compare_all(bundle.root, expected, progress)
