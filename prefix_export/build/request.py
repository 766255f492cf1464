"""What to build, and every check of it that needs no model and no heavy library.

The command line runs these checks before it imports torch, so that a mistake is answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prefix_export import targets
from prefix_export.errors import ExportError, ModelError
from prefix_export.models.names import check_checkpoint, check_model
from prefix_export.quantize.options import Quantization, quantization
from prefix_runtime.bundle.staging import check_output
from prefix_runtime.bundle.task_names import check_free_task_name, task_key
from prefix_runtime.prefix.geometry import LEAST_TEXT


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        model: a Hub id or a folder.
        prefixes: a trained checkpoint for each task.
        output: the bundle's folder, which must not exist yet.
        max_length: maximum number of positions for prefix plus text. Default: the model's context.
        mode: "feed", or "bake": the graph holds the prefixes, and its tasks cannot change.
        target: what the graph is made for, one of `targets.TARGETS`. Default: "cpu", or "portable" for "bake".
        opset: version of ONNX' own operators. Default: the target's.
        graph: a decoder-with-past of the model in float32 that was exported before; the bundle uses it unchanged.
        adapters: "onnx" also writes onnxruntime's adapter file for each task, and a graph that takes them.
        precision: of the weights: "fp32", "fp16", "bf16", "int8" or "int4". Default: the target's first.
        block_size: weights that share a scale. Default: `quantization.DEFAULT_BLOCK_SIZE`; for the target tensorrt all
            weights of an output.
        quantizer: how weights are quantized: "rtn" or "hqq".
        cache: type of keys and values: "fp32", "fp16", "bf16" or "int8". Default: the target's.
        held_out: text files, one text a line, by task. They compare the quantized model with float32. The file under
            None serves the bare model and tasks without a file of their own. Default: the demo's texts.
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

    @property
    def is_exact(self) -> bool:
        """True if neither weights nor keys and values are rounded; needs `precision` and `cache` filled in."""
        return self.precision == "fp32" and self.cache == "fp32"

    @property
    def needs_text(self) -> bool:
        """True if held-out text is used: to compare with float32, or to measure the scales of an int8 cache."""
        return not self.is_exact and (self.verify or self.cache == "int8")


@dataclass(frozen=True)
class CheckedRequest:
    """A request without contradictions.

    Attributes:
        request: with `precision` and `cache` filled in.
        plan: the target and what was chosen of it.
        quantization: of the weights, or None.
    """

    request: BuildRequest
    plan: targets.GraphPlan
    quantization: Quantization | None


def check_request(request: BuildRequest) -> CheckedRequest:
    """The request with its defaults filled in, checked as far as that needs no model.

    Raises:
        PrefixExportError, PrefixRuntimeError: the request contradicts itself, or names a file or folder that is missing
            or in the way.
    """
    check_output(request.output)
    _check_names(request.prefixes)
    if request.max_length is not None and request.max_length < LEAST_TEXT:
        raise ModelError(f"max_length: expected {LEAST_TEXT} or more, found {request.max_length}")
    plan = _plan(request)
    settings = quantization(
        plan.precision, request.block_size, request.quantizer, by_output=plan.target.has_output_scales
    )
    request = replace(request, precision=plan.precision, cache=plan.cache)
    _check_held_out(request)
    return CheckedRequest(request, plan, settings)


def check_sources(request: BuildRequest) -> None:
    """Refuse a model or a checkpoint that is a path where nothing is; the Hub is not asked.

    Raises:
        ModelError: there is no such model folder or file.
        CheckpointError: there is no such checkpoint.
    """
    check_model(request.model)
    for path in request.prefixes.values():
        check_checkpoint(path)


def _plan(request: BuildRequest) -> targets.GraphPlan:
    target = "portable" if request.graph is not None and request.target is None else request.target
    plan = targets.plan(
        target, request.mode, request.precision, request.cache, request.opset, adapters=request.adapters
    )
    if plan.mode == "bake" and not request.prefixes:
        raise ExportError("mode bake: expected at least one prefix to put into the graph, found none")
    if plan.has_adapters and not request.prefixes:
        raise ExportError("adapters: expected at least one prefix to write as an adapter file, found none")
    _check_graph(request, plan)
    return plan


def _check_names(prefixes: Mapping[str, Path]) -> None:
    taken: dict[str, str] = {}
    for name in prefixes:
        check_free_task_name(name, taken)
        taken[task_key(name)] = name


def _check_graph(request: BuildRequest, plan: targets.GraphPlan) -> None:
    """Refuse options that would change a graph that the bundle is to use unchanged."""
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


def _check_held_out(request: BuildRequest) -> None:
    if request.held_out and request.is_exact:
        raise ExportError("held-out text: expected weights or a cache to round and compare with float32, found none")
    if request.held_out and not request.needs_text:
        raise ExportError("held-out text: expected a comparison with float32 to use it for, found --no-verify")
    for task, path in request.held_out.items():
        # A checkpoint of several prefixes makes tasks of more names than are known here.
        if task is not None and not any(task == name or task.startswith(f"{name}-") for name in request.prefixes):
            raise ExportError(f"held-out text {path}: expected one of the tasks that are built, found {task!r}")
        if not path.is_file():
            raise ExportError(
                f"held-out text {path}: expected a text file, found {'a folder' if path.is_dir() else 'none'}"
            )
