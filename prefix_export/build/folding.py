"""The first step of a build: a model as it was loaded, and the prefixes of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from prefix_export import targets
from prefix_export.errors import ExportError, ModelError
from prefix_export.models import BaseModel
from prefix_export.models.experts import notes as expert_notes
from prefix_export.models.generation_defaults import generation_report
from prefix_export.prefixes.adapter_tokenizer import with_adapters_tokenizer
from prefix_export.prefixes.fold import fetch_checkpoint, fold
from prefix_export.prefixes.lint import lint
from prefix_export.prefixes.reference import PrefixSource, SourcedPrefixes
from prefix_export.progress import Progress
from prefix_export.quantize.options import BITS
from prefix_export.trace.attention import check_fast_flavour
from prefix_runtime import Prefix
from prefix_runtime.bundle.task_names import check_free_task_name, task_key
from prefix_runtime.files import check_room
from prefix_runtime.prefix.cache_format import in_float16
from prefix_runtime.prefix.geometry import LEAST_TEXT

from .request import BuildRequest, CheckedRequest

_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, **BITS}


@dataclass(frozen=True)
class FoldedModel:
    """A base model with its weights as they were loaded, and the prefixes that it is built with.

    Attributes:
        checked: the request.
        base: the model, with the tokenizer that the bundle takes.
        sourced: the prefixes by task, and where each comes from.
        max_length: positions for prefix and text together.
        warnings: what the user should know, one line each.
    """

    checked: CheckedRequest
    base: BaseModel
    sourced: SourcedPrefixes
    max_length: int
    warnings: tuple[str, ...]

    @property
    def prefixes(self) -> Mapping[str, Prefix]:
        """The prefixes by task."""
        return self.sourced.prefixes


def load_and_fold(checked: CheckedRequest, load: Callable[[str], BaseModel], progress: Progress) -> FoldedModel:
    """Load the base model and fold its prefixes.

    Raises:
        ModelError, CheckpointError, PrefixRuntimeError: see `build`.
        OSError: the disk has no room for the weights.
    """
    request, plan = checked.request, checked.plan
    progress.phase("load", detail=request.model)
    base = load(request.model)
    if plan.target.flavour == "fast":
        check_fast_flavour(base.model, base.layers)
    if request.graph is None:
        check_room(request.output, _least_weight_bytes(base, plan.precision))
    max_length = _max_length(request, base)
    progress.phase("fold", len(request.prefixes))
    sourced, folding = _fold_all(request, plan, base, max_length, progress)
    base, notes = with_adapters_tokenizer(base, sourced.sources)
    warnings = (*folding, *notes, *_warnings(request, plan.target, base, sourced.prefixes, max_length))
    _check_held_out_tasks(request, sourced.prefixes)
    return FoldedModel(checked, base, sourced, max_length, warnings)


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
            prefixes[name] = in_float16(own) if plan.cache == "fp16" else own
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
        listed = ", ".join(f"{name!r} (task {task!r})" for name, task in said.items())
        raise ExportError(
            f"mode bake: expected prefixes of one base model, found {listed}; bake those of each model by "
            "themselves, or, where these are names of one model, write one of them into the adapters' configurations"
        )


def _check_held_out_tasks(request: BuildRequest, prefixes: Mapping[str, Prefix]) -> None:
    for task, path in request.held_out.items():
        if task is not None and task not in prefixes:
            raise ExportError(f"held-out text {path}: expected one of the tasks that are built, found {task!r}")


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


def _warnings(
    request: BuildRequest, target: targets.Target, base: BaseModel, prefixes: Mapping[str, Prefix], max_length: int
) -> list[str]:
    warnings = list(base.warnings)
    notes = expert_notes(base.model, is_quantized=request.precision in BITS)
    warnings += [f"{request.model}: {line}" for line in notes]
    positions = base.model.config.get_text_config().max_position_embeddings
    if base.geometry.context_length < positions:
        warnings.append(
            f"{request.model}: the context is {base.geometry.context_length} of {positions} positions: beyond, the "
            "model's rotary scaling changes what is cached"
        )
    if request.cache == "fp16" and target.flavour == "fast" and not target.is_for_gpu:
        warnings.append(
            "cache fp16: on a CPU onnxruntime widens the whole buffer in every step: slower than fp32, int8"
        )
    if request.mode == "bake" and len(prefixes) > 1:
        numbered = ", ".join(f"{index} {task}" for index, task in enumerate(sorted(prefixes)))
        warnings.append(
            f"the graph has an input task_id ({numbered}), which optimum, onnxruntime-genai and transformers.js do not "
            "give: for them bake one prefix"
        )
    if base.tokenizer is None:
        warnings.append(f"{request.model} has no tokenizer: the bundle takes token ids, not text")
    warnings += generation_report(base).warnings
    for task, prefix in prefixes.items():
        warnings += [f"task {task!r}: {line}" for line in lint(prefix, base.shape, max_length)]
    return warnings
