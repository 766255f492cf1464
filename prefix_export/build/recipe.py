"""The recipe: a base model and trained prefixes to a bundle."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from prefix_export import __version__, targets
from prefix_export.clients import GENAI_CONFIG_NAME, genai_config, save_adapters, save_configs, write_json
from prefix_export.errors import ExportError, ModelError
from prefix_export.graph.adopt import adopt_graph
from prefix_export.models import BaseModel, load_base_model
from prefix_export.models.experts import notes as expert_notes
from prefix_export.models.generation_defaults import generation_report
from prefix_export.prefixes.adapter_tokenizer import with_adapters_tokenizer
from prefix_export.prefixes.fold import fetch_checkpoint, fold
from prefix_export.prefixes.lint import lint
from prefix_export.prefixes.reference import PrefixSource, SourcedPrefixes
from prefix_export.progress import SILENT, PhaseTimes, Progress
from prefix_export.quantize.calibrate import cache_scales, save_scales
from prefix_export.quantize.modules import QuantizedModel
from prefix_export.quantize.options import BITS, Quantization, quantization
from prefix_export.tokenizers.held_out import HeldOut, read_held_out
from prefix_export.tokenizers.tokenizer import tokenizer_warnings
from prefix_export.trace.attention import check_fast_flavour
from prefix_export.verify.all_tasks import (
    FloatAnswers,
    answer_all,
    assess_all,
    certificate,
    check_can_run,
    compare_all,
    observe_all,
)
from prefix_export.verify.parity import Expectation, TaskParity
from prefix_export.verify.quality import TaskQuality
from prefix_runtime import Bundle, LayerPrefix, Manifest, Prefix
from prefix_runtime.bundle.folder import MANIFEST_NAME, describe_file, staged, write_prefix
from prefix_runtime.bundle.manifest import FileEntry, ModelEntry, check_free_task_name, task_key
from prefix_runtime.files import check_room, write_file_atomically
from prefix_runtime.prefix.cache_format import CACHE_TYPES, CacheFormat
from prefix_runtime.prefix.geometry import LEAST_TEXT

from .plan import arithmetic, export_plan
from .request import BuildRequest, check_request, check_sources

_MEGABYTE = 1e6
_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, **BITS}


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
    request, plan, settings = checked.request, checked.plan, checked.quantization
    if load is None:
        check_sources(request)
    if request.verify:
        check_can_run(plan.precision)
    times.phase("load", detail=request.model)
    base = (load or load_base_model)(request.model)
    if plan.target.flavour == "fast":
        check_fast_flavour(base.model, base.layers)
    if request.graph is None:
        check_room(request.output, _least_weight_bytes(base, plan.precision))
    max_length = _max_length(request, base)
    times.phase("fold", len(request.prefixes))
    sourced, folding = _fold_all(request, plan, base, max_length, times)
    prefixes = sourced.prefixes
    base, notes = with_adapters_tokenizer(base, sourced.sources)
    warnings = (*folding, *notes, *_warnings(request, plan.target, base, prefixes, max_length))
    _check_held_out_tasks(request, prefixes)
    texts = _held_out(request, base, prefixes, max_length)
    measured, compared = _split(request, texts)
    in_float = answer_all(base, sourced, compared, times) if request.verify and request.needs_text else {}
    quantized = QuantizedModel(base.model, settings, times) if settings else None
    scales = cache_scales(base, prefixes, measured, times) if request.cache == "int8" else None
    expected = {}
    if request.verify:
        exact = arithmetic(plan, scales)
        expected = observe_all(base, sourced, texts, exact, max_length=max_length, progress=times)
    with staged(request.output) as folder:
        if request.graph is not None:
            times.phase("adopt the graph")
            weight_bytes = adopt_graph(request.graph, base.layers, base.geometry.vocab_size, folder / plan.graph)
        else:
            weight_bytes = export_plan(base, plan, prefixes, folder, quantized=quantized, scales=scales, progress=times)
        save_scales(scales, folder)
        save_configs(base, folder)
        warnings += tokenizer_warnings(folder, base.tokenizer)
        _save_for_clients(plan, base, prefixes, max_length, folder)
        files = _described(folder, times)
        manifest = _manifest(
            plan, settings, base, prefixes, weight_bytes, max_length=max_length, folder=folder, files=files
        )
        _write_manifest(folder, manifest)
        # The engine needs the room that the model takes, which torch's export keeps alive by cycles.
        del base, quantized
        gc.collect()
        parity, quality = _certified(folder, manifest, expected, in_float, times)
        times.phase("write to the disk")
    times.end()
    seconds = time.perf_counter() - started
    return BuildResult(Bundle.open(request.output), parity, quality, seconds, warnings, times.seconds)


def _certified(
    folder: Path,
    manifest: Manifest,
    expected: Mapping[str | None, Expectation],
    in_float: Mapping[str | None, FloatAnswers],
    progress: Progress,
) -> tuple[Mapping[str | None, TaskParity], Mapping[str | None, TaskQuality]]:
    """Compare a bundle's graph, where something is expected of it, and write the certificate into its manifest."""
    if not expected:
        return {}, {}
    parity = compare_all(folder, expected, progress)
    quality = assess_all(folder, in_float, progress) if in_float else {}
    graph_bytes = sum(entry.size for name, entry in manifest.files.items() if name.startswith(manifest.graph))
    _write_manifest(folder, replace(manifest, parity=certificate(parity, quality, graph_bytes)))
    return parity, quality


def _save_for_clients(
    plan: targets.GraphPlan, base: BaseModel, prefixes: Mapping[str, Prefix], max_length: int, folder: Path
) -> None:
    """Write what other people's programs read beside the graph."""
    if plan.has_adapters:
        save_adapters(prefixes, folder, CACHE_TYPES[plan.cache])
    if plan.name == "portable" and plan.mode == "bake" and len(prefixes) == 1:
        (prefix,) = prefixes.values()
        room = base.geometry.room(prefix, max_length)
        write_json(folder / GENAI_CONFIG_NAME, genai_config(base, plan.graph, room))


def _fold_all(
    request: BuildRequest, plan: targets.GraphPlan, base: BaseModel, max_length: int, progress: Progress
) -> tuple[SourcedPrefixes, tuple[str, ...]]:
    """Every prefix of every source, checked against the model and marked as made for it, and what to warn of."""
    prefixes: dict[str, Prefix] = {}
    taken: dict[str, str] = {}
    sources: dict[str, PrefixSource | None] = {}
    warnings: list[str] = []
    for task, named in request.prefixes.items():
        path = fetch_checkpoint(named)  # once: what is on the Hub is asked for over the network
        folded = fold(path, base.shape, lambda: base)
        warnings += [f"task {task!r}: {line}" for line in folded.warnings]
        for part, prefix in folded.prefixes.items():
            name = f"{task}-{part}" if part else task
            check_free_task_name(name, taken)
            taken[task_key(name)] = name
            base.geometry.check_prefix(prefix, f"{path}{f', {part}' if part else ''}", base.fingerprint, max_length)
            own = replace(prefix, base_fingerprint=base.fingerprint)
            prefixes[name] = _in_float16(own) if plan.cache == "fp16" else own
            sources[name] = PrefixSource(path, part)
            if prefix.head:
                warnings.append(f"task {name!r}: its head ({', '.join(sorted(prefix.head))}) is not exported")
        progress.advance()
    if plan.mode == "bake":
        _check_one_base(prefixes)
    return SourcedPrefixes(prefixes, sources), tuple(warnings)


def _check_one_base(prefixes: Mapping[str, Prefix]) -> None:
    """Refuse to bake prefixes that say that they were trained on different models: no run could tell.

    A Hub id names a model, with or without its owner (`gpt2` is `openai-community/gpt2`); a folder's name says little,
    so that a doubt of it is a warning alone (`lint`).
    """
    said = {name: task for task, prefix in prefixes.items() if (name := prefix.metadata.get("base_model"))}
    owned = {name for name in said if "/" in name}
    if len(owned) > 1 or len({name.rpartition("/")[2].casefold() for name in said}) > 1:
        found = ", ".join(f"{name!r} (task {task!r})" for name, task in said.items())
        raise ExportError(
            f"mode bake: expected prefixes of one base model, found {found}; bake those of each model by "
            "themselves, or, where these are names of one model, write one of them into the adapters' configurations"
        )


def _conditions(mode: str, tasks: Iterable[str]) -> tuple[str | None, ...]:
    """What a graph answers under: each task, and where it holds none the bare model."""
    return tuple(tasks) if mode == "bake" else (None, *tasks)


def _check_held_out_tasks(request: BuildRequest, prefixes: Mapping[str, Prefix]) -> None:
    for task, path in request.held_out.items():
        if task is not None and task not in prefixes:
            raise ExportError(f"held-out text {path}: expected one of the tasks that are built, found {task!r}")


def _held_out(
    request: BuildRequest, base: BaseModel, prefixes: Mapping[str, Prefix], max_length: int
) -> dict[str | None, HeldOut]:
    """The texts of each task and of the bare model: prompts of the comparison, and what rounding is measured on."""
    if not (request.verify or request.needs_text):
        return {}
    conditions = _conditions(request.mode, prefixes)
    files = {task: request.held_out.get(task, request.held_out.get(None)) for task in conditions}
    return {
        task: read_held_out(path, base, prefixes[task] if task else None, max_length) for task, path in files.items()
    }


def _split(
    request: BuildRequest, held_out: Mapping[str | None, HeldOut]
) -> tuple[Mapping[str | None, HeldOut], Mapping[str | None, HeldOut]]:
    """The texts that scales are measured on, and those that quality is: not the same, where there are two."""
    if request.cache != "int8":
        return held_out, held_out

    def part(first: int) -> dict[str | None, HeldOut]:
        return {task: replace(held, texts=held.texts[first::2] or held.texts) for task, held in held_out.items()}

    return part(0), part(1)


def _in_float16(prefix: Prefix) -> Prefix:
    """A prefix as keys and values of float16 take it, in half the bytes."""
    sites = {
        site: tuple(LayerPrefix(layer.key.astype(np.float16), layer.value.astype(np.float16)) for layer in layers)
        for site, layers in prefix.sites.items()
    }
    return replace(prefix, sites=sites)


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
        for task in _conditions(manifest.mode, prefixes)
    }
    scales = CacheFormat.of_bundle(bundle.root, manifest.cache, manifest.geometry).scales
    folded = SourcedPrefixes(prefixes, dict.fromkeys(prefixes))
    expected = observe_all(
        base, folded, texts, arithmetic(plan, scales), max_length=manifest.max_length, progress=progress
    )
    return compare_all(bundle.root, expected, progress)


def _max_length(request: BuildRequest, base: BaseModel) -> int:
    context = base.geometry.context_length
    if request.max_length is not None and not LEAST_TEXT <= request.max_length <= context:
        raise ModelError(
            f"max_length: expected {LEAST_TEXT} to the context of {request.model}, {context}, "
            f"found {request.max_length}"
        )
    return request.max_length or context


def _least_weight_bytes(base: BaseModel, precision: str) -> int:
    """A lower bound of what the graph's weights take on the disk."""
    numbers = sum(parameter.numel() for parameter in base.model.parameters())
    return numbers * _BITS[precision] // 8


def _described(folder: Path, progress: Progress) -> dict[str, FileEntry]:
    """Every file of a folder, with its hash, by its path there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    progress.phase("hash", round(sum(path.stat().st_size for path in paths) / _MEGABYTE), unit="MB")
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {name: describe_file(folder, name, lambda size: progress.advance(size / _MEGABYTE)) for name in names}


def _manifest(
    plan: targets.GraphPlan,
    settings: Quantization | None,
    base: BaseModel,
    prefixes: Mapping[str, Prefix],
    weight_bytes: int,
    *,
    max_length: int,
    folder: Path,
    files: Mapping[str, FileEntry],
) -> Manifest:
    return Manifest(
        producer=f"prefix-export {__version__}",
        model=ModelEntry(base.name, type(base.model).__name__, base.fingerprint, base.revision),
        geometry=base.geometry,
        max_length=max_length,
        mode=plan.mode,
        flavour=plan.target.flavour,
        precision=plan.precision,
        target=plan.name,
        graph=plan.graph,
        weight_bytes=weight_bytes,
        files=files,
        tasks={task: write_prefix(folder, task, prefix) for task, prefix in prefixes.items()},
        cache=plan.cache,
        block_size=settings.block_size if settings else None,
        quantizer=settings.method if settings else None,
        generation=generation_report(base).record(),
    )


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_file_atomically(folder / MANIFEST_NAME, manifest.to_json().encode())


def _warnings(
    request: BuildRequest, target: targets.Target, base: BaseModel, prefixes: Mapping[str, Prefix], max_length: int
) -> list[str]:
    found = list(base.warnings)
    notes = expert_notes(base.model, is_quantized=request.precision in BITS)
    found += [f"{request.model}: {line}" for line in notes]
    positions = base.model.config.get_text_config().max_position_embeddings
    if base.geometry.context_length < positions:
        found.append(
            f"{request.model}: the context is {base.geometry.context_length} of {positions} positions: beyond, the "
            "model's rotary scaling changes what is cached"
        )
    if request.cache == "fp16" and target.flavour == "fast" and not target.is_for_gpu:
        found.append("cache fp16: on a CPU onnxruntime widens the whole buffer in every step: slower than fp32, int8")
    if request.mode == "bake" and len(prefixes) > 1:
        numbered = ", ".join(f"{index} {task}" for index, task in enumerate(sorted(prefixes)))
        found.append(
            f"the graph has an input task_id ({numbered}), which optimum, onnxruntime-genai and transformers.js do not "
            "give: for them bake one prefix"
        )
    if base.tokenizer is None:
        found.append(f"{request.model} has no tokenizer: the bundle takes token ids, not text")
    found += generation_report(base).warnings
    for task, prefix in prefixes.items():
        found += [f"task {task!r}: {line}" for line in lint(prefix, base.shape, max_length)]
    return found
