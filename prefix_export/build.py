"""The recipe: a base model and trained prefixes to a bundle."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from prefix_runtime import Bundle, LayerPrefix, Manifest, Prefix
from prefix_runtime.bundle import MANIFEST_NAME, check_output, describe_file, staged, write_prefix
from prefix_runtime.cache_format import CACHE_TYPES
from prefix_runtime.geometry import LEAST_TEXT
from prefix_runtime.manifest import ModelEntry, check_free_task_name, task_key
from prefix_runtime.storage import write_file_atomically

from . import __version__, targets
from .adopt import adopt_graph
from .attention import check_fast_flavour
from .calibrate import cache_scales, save_scales
from .clients import GENAI_CONFIG_NAME, genai_config, save_adapters, save_configs, write_json
from .errors import ExportError, ModelError
from .export import export_plan
from .fold import fold, located
from .lint import lint
from .models import BaseModel, load_base_model
from .parity import PrefixSource, TaskParity
from .progress import StepListener
from .quality import HeldOut, TaskQuality, read_held_out
from .quantize import QuantizedModel
from .rounding import Quantization, quantization
from .verification import answer_all, assess_all, certificate, check_can_run, compare_all, observe_all


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        model: a Hub id or a folder.
        prefixes: a trained checkpoint for each task.
        output: the bundle's folder, which must not exist yet.
        max_length: positions that prefix and text may take together; None takes the model's context.
        mode: "feed", or "bake": the graph holds the prefixes, and its tasks cannot change.
        target: what the graph is made for, of `targets.TARGETS`; None takes "cpu", or "portable" for "bake".
        opset: of ONNX' own operators; None takes the target's.
        graph: of the model, a decoder-with-past in float32 that was exported before, to be used as it is.
        adapters: "onnx" writes an adapter file of onnxruntime's for each task, and a graph that takes them.
        precision: of the weights: "fp32", "fp16", "bf16", "int8" or "int4"; None takes the target's first.
        block_size: weights that share a scale; None takes `rounding.DEFAULT_BLOCK_SIZE`, for the target tensorrt all
            of an output.
        quantizer: how weights are rounded: "rtn" or "hqq".
        cache: what keys and values are kept in: "fp32", "fp16", "bf16" or "int8"; None takes the target's.
        held_out: text files, a text a line, on which float32 and what is rounded are compared, by task; the one under
            None is for tasks without one of their own and for the bare model. Where there is none, the demo's.
        verify: compare the graph with the source framework before the bundle is moved into place.
    """

    model: str
    prefixes: Mapping[str, Path]
    output: Path
    max_length: int | None = None
    mode: str = "feed"
    target: str | None = None
    opset: int | None = None
    graph: Path | None = None
    adapters: str | None = None
    precision: str | None = None
    block_size: int | None = None
    quantizer: str = "rtn"
    cache: str | None = None
    held_out: Mapping[str | None, Path] = field(default_factory=dict)
    verify: bool = True


@dataclass(frozen=True)
class BuildResult:
    """What was built.

    Attributes:
        bundle: as it is on disk.
        parity: by task, the bare model under None; empty where it was not verified.
        quality: of what was rounded, by task; empty where nothing was, or it was not verified.
        seconds: that the whole took.
        warnings: what the user should know, a line each.
    """

    bundle: Bundle
    parity: Mapping[str | None, TaskParity]
    quality: Mapping[str | None, TaskQuality]
    seconds: float
    warnings: tuple[str, ...] = field(default=())


def build(
    request: BuildRequest,
    on_step: StepListener = lambda step: None,
    load: Callable[[str], BaseModel] | None = None,
) -> BuildResult:
    """Fold the prefixes, export the model, compare both with the source framework, and write the bundle.

    Args:
        request: what to build.
        on_step: told what is done next.
        load: makes the base model of its name; None loads it.

    Raises:
        PrefixExportError, PrefixRuntimeError: naming what is wrong; nothing is left behind.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    started = time.perf_counter()
    check_output(request.output)
    plan = _plan(request)
    request = replace(request, precision=plan.precision, cache=plan.cache)
    by_output = plan.target.has_output_scales
    settings = quantization(plan.precision, request.block_size, request.quantizer, by_output=by_output)
    _check_held_out(request)
    on_step(f"loading {request.model}")
    base = (load or load_base_model)(request.model)
    if plan.target.flavour == "fast":
        check_fast_flavour(base.model, base.layers)
    max_length = _max_length(request, base)
    on_step("folding prefixes")
    sourced = _fold_all(request, plan, base, max_length)
    prefixes, sources = sourced.prefixes, sourced.sources
    warnings = (*sourced.warnings, *_warnings(request, plan.target, base, prefixes, max_length))
    _check_held_out_tasks(request, prefixes)
    measured, compared = _split(request, _held_out(request, base, prefixes, max_length))
    in_float = answer_all(base, prefixes, sources, compared, on_step) if request.verify else {}
    quantized = _quantize(base, settings, on_step)
    scales = _scales(request, base, prefixes, measured, on_step)
    conditions = _conditions(plan.mode, prefixes) if request.verify else ()
    expected = observe_all(base, prefixes, sources, conditions, max_length=max_length, on_step=on_step)
    with staged(request.output) as folder:
        on_step("exporting the graph")
        if request.graph is not None:
            weight_bytes = adopt_graph(request.graph, base.layers, base.geometry.vocab_size, folder / plan.graph)
        else:
            weight_bytes = export_plan(base, plan, prefixes, folder, quantized=quantized, scales=scales)
        if scales is not None:
            save_scales(scales, folder)
        save_configs(base, folder)
        _save_for_clients(plan, base, prefixes, max_length, folder)
        on_step("hashing")
        manifest = _manifest(plan, settings, base, prefixes, weight_bytes, max_length=max_length, folder=folder)
        _write_manifest(folder, manifest)
        # The engine needs the room that the model takes, which torch's export keeps alive by cycles.
        del base, quantized
        gc.collect()
        parity = compare_all(folder, expected, on_step) if request.verify else {}
        quality = assess_all(folder, in_float, on_step) if in_float else {}
        if parity:
            graph_bytes = sum(entry.size for name, entry in manifest.files.items() if name.startswith(plan.graph))
            _write_manifest(folder, replace(manifest, parity=certificate(parity, quality, graph_bytes)))
        on_step("writing the bundle")
    return BuildResult(Bundle.open(request.output), parity, quality, time.perf_counter() - started, warnings)


def _save_for_clients(
    plan: targets.Plan, base: BaseModel, prefixes: Mapping[str, Prefix], max_length: int, folder: Path
) -> None:
    """Write what other people's programs read beside the graph."""
    if plan.has_adapters:
        save_adapters(prefixes, folder, CACHE_TYPES[plan.cache])
    if plan.name == "portable" and plan.mode == "bake" and len(prefixes) == 1:
        (prefix,) = prefixes.values()
        room = base.geometry.room(prefix, max_length)
        write_json(folder / GENAI_CONFIG_NAME, genai_config(base, plan.graph, room))


def _plan(request: BuildRequest) -> targets.Plan:
    """What is to be made.

    Raises:
        PrefixExportError, PrefixRuntimeError: the request contradicts itself, or asks for what cannot be done here.
    """
    _check_names(request.prefixes)
    target = "portable" if request.graph is not None and request.target is None else request.target
    plan = targets.plan(
        target, request.mode, request.precision, request.cache, request.opset, adapters=request.adapters
    )
    if plan.mode == "bake" and not request.prefixes:
        raise ExportError("mode bake: expected at least one prefix to put into the graph, found none")
    if plan.has_adapters and not request.prefixes:
        raise ExportError("adapters: expected at least one prefix to write as an adapter file, found none")
    _check_graph(request, plan)
    if request.verify:
        check_can_run(plan.precision)
    return plan


@dataclass(frozen=True)
class _Sourced:
    """The prefix of each task as the bundle keeps it, what it was folded from, and what the user should know."""

    prefixes: dict[str, Prefix]
    sources: dict[str, PrefixSource]
    warnings: tuple[str, ...]


def _fold_all(request: BuildRequest, plan: targets.Plan, base: BaseModel, max_length: int) -> _Sourced:
    """Every prefix of every source, checked against the model and marked as made for it."""
    prefixes: dict[str, Prefix] = {}
    taken: dict[str, str] = {}
    sources: dict[str, PrefixSource] = {}
    warnings: list[str] = []
    for task, named in request.prefixes.items():
        path = located(named)  # once: what is on the Hub is asked for over the network
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
    if plan.mode == "bake":
        _check_one_base(prefixes)
    return _Sourced(prefixes, sources, tuple(warnings))


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


def _check_graph(request: BuildRequest, plan: targets.Plan) -> None:
    """Refuse what would have to change a graph that is to be used as it is."""
    if request.graph is None:
        return
    if not request.graph.is_file():
        what = "a folder" if request.graph.is_dir() else "none"
        raise ExportError(f"graph {request.graph}: expected an ONNX file, found {what}")
    expected = ("portable", "feed", "fp32", False)
    if (plan.name, plan.mode, plan.precision, plan.has_adapters) != expected or request.opset is not None:
        raise ExportError(
            f"graph {request.graph}: expected target portable, mode feed and precision fp32, no opset and no adapters, "
            "as for a graph that is used as it is"
        )


def _conditions(mode: str, tasks: Iterable[str]) -> tuple[str | None, ...]:
    """What a graph answers under: each task, and where it holds none the bare model."""
    return tuple(tasks) if mode == "bake" else (None, *tasks)


def _check_held_out(request: BuildRequest) -> None:
    if request.held_out and _is_exact(request):
        raise ExportError("held-out text: expected weights or a cache to round and compare with float32, found none")
    if request.held_out and not (request.verify or request.cache == "int8"):
        raise ExportError("held-out text: expected a comparison with float32 to use it for, found --no-verify")
    for task, path in request.held_out.items():
        # A checkpoint of several prefixes makes tasks of more names than are known here.
        if task is not None and not any(task == name or task.startswith(f"{name}-") for name in request.prefixes):
            raise ExportError(f"held-out text {path}: expected one of the tasks that are built, found {task!r}")
        if not path.is_file():
            raise ExportError(f"held-out text {path}: expected a text file, found none")


def _check_held_out_tasks(request: BuildRequest, prefixes: Mapping[str, Prefix]) -> None:
    for task, path in request.held_out.items():
        if task is not None and task not in prefixes:
            raise ExportError(f"held-out text {path}: expected one of the tasks that are built, found {task!r}")


def _held_out(
    request: BuildRequest, base: BaseModel, prefixes: Mapping[str, Prefix], max_length: int
) -> dict[str | None, HeldOut]:
    """The texts of each task and of the bare model, where something is about to be rounded."""
    if _is_exact(request) or not (request.verify or request.cache == "int8"):
        return {}
    conditions = _conditions(request.mode, prefixes)
    files = {task: request.held_out.get(task, request.held_out.get(None)) for task in conditions}
    return {
        task: read_held_out(path, base, prefixes[task] if task else None, max_length) for task, path in files.items()
    }


def _is_exact(request: BuildRequest) -> bool:
    return request.precision == "fp32" and request.cache == "fp32"


def _split(
    request: BuildRequest, held_out: Mapping[str | None, HeldOut]
) -> tuple[Mapping[str | None, HeldOut], Mapping[str | None, HeldOut]]:
    """The texts that scales are measured on, and those that quality is: not the same, where there are two."""
    if request.cache != "int8":
        return held_out, held_out

    def part(first: int) -> dict[str | None, HeldOut]:
        return {task: replace(held, texts=held.texts[first::2] or held.texts) for task, held in held_out.items()}

    return part(0), part(1)


def _scales(
    request: BuildRequest,
    base: BaseModel,
    prefixes: Mapping[str, Prefix],
    held_out: Mapping[str | None, HeldOut],
    on_step: StepListener,
) -> tuple[LayerPrefix, ...] | None:
    if request.cache != "int8":
        return None
    on_step("measuring keys and values")
    return cache_scales(base, prefixes, held_out)


def _quantize(base: BaseModel, settings: Quantization | None, on_step: StepListener) -> QuantizedModel | None:
    if settings is None:
        return None
    on_step(f"rounding the weights to {settings.bits} bits")
    return QuantizedModel(base.model, settings)


def _in_float16(prefix: Prefix) -> Prefix:
    """A prefix as keys and values of float16 take it, in half the bytes."""
    sites = {
        site: tuple(LayerPrefix(layer.key.astype(np.float16), layer.value.astype(np.float16)) for layer in layers)
        for site, layers in prefix.sites.items()
    }
    return replace(prefix, sites=sites)


def verify_against(
    bundle: Bundle, model: str, on_step: StepListener = lambda step: None
) -> dict[str | None, TaskParity]:
    """Compare a bundle's graph with a base model, under every task and without.

    Raises:
        ParityError: they differ.
        ModelError: the model cannot be loaded, or it is not the one that the bundle was built from.
    """
    on_step(f"loading {model}")
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
        on_step("rounding the weights")
        QuantizedModel(base.model, settings)
    prefixes = {task: bundle.prefix(task) for task in bundle.tasks}
    conditions = _conditions(manifest.mode, prefixes)
    sources = dict.fromkeys(prefixes)
    expected = observe_all(base, prefixes, sources, conditions, max_length=manifest.max_length, on_step=on_step)
    return compare_all(bundle.root, expected, on_step)


def _check_names(prefixes: Mapping[str, Path]) -> None:
    taken: dict[str, str] = {}
    for name in prefixes:
        check_free_task_name(name, taken)
        taken[task_key(name)] = name


def _max_length(request: BuildRequest, base: BaseModel) -> int:
    context = base.geometry.context_length
    if request.max_length is not None and not LEAST_TEXT <= request.max_length <= context:
        raise ModelError(
            f"max_length: expected {LEAST_TEXT} to the context of {request.model}, {context}, "
            f"found {request.max_length}"
        )
    return request.max_length or context


def _manifest(
    plan: targets.Plan,
    settings: Quantization | None,
    base: BaseModel,
    prefixes: Mapping[str, Prefix],
    weight_bytes: int,
    *,
    max_length: int,
    folder: Path,
) -> Manifest:
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return Manifest(
        producer=f"prefix-export {__version__}",
        model=ModelEntry(base.name, type(base.model).__name__, base.fingerprint),
        geometry=base.geometry,
        max_length=max_length,
        mode=plan.mode,
        flavour=plan.target.flavour,
        precision=plan.precision,
        target=plan.name,
        graph=plan.graph,
        weight_bytes=weight_bytes,
        files={name: describe_file(folder, name) for name in files},
        tasks={task: write_prefix(folder, task, prefix) for task, prefix in prefixes.items()},
        cache=plan.cache,
        block_size=settings.block_size if settings else None,
        quantizer=settings.method if settings else None,
    )


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_file_atomically(folder / MANIFEST_NAME, manifest.to_json().encode())


def _warnings(
    request: BuildRequest, target: targets.Target, base: BaseModel, prefixes: Mapping[str, Prefix], max_length: int
) -> list[str]:
    found = []
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
    for task, prefix in prefixes.items():
        found += [f"task {task!r}: {line}" for line in lint(prefix, base.shape, max_length)]
    return found
