"""All tasks of a bundle against the source framework: parity of the graph, and what rounding costs in quality."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from prefix_export.errors import ExportError, ParityError
from prefix_export.models import BaseModel, cast_weights
from prefix_export.prefixes.reference import SourcedPrefixes, reference
from prefix_export.progress import Progress, shown_task
from prefix_export.quantize.modules import as_exact
from prefix_export.quantize.options import BITS
from prefix_export.tokenizers.held_out import HeldOut
from prefix_runtime import Bundle, Engine, ProviderError, load
from prefix_runtime.backends.onnxruntime.adapter_files import run_with_adapter
from prefix_runtime.backends.onnxruntime.backend import OnnxRuntime
from prefix_runtime.backends.onnxruntime.providers import check_provider
from prefix_runtime.backends.onnxruntime.session import Session
from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.bundle.folder import adapter_path

from .parity import Expectation, TaskParity, compare, measured, observe
from .quality import Answers, TaskQuality, answers, assess
from .yardstick import Arithmetic, largest_difference


@dataclass(frozen=True)
class FloatAnswers:
    """What the float32 model makes of held-out texts."""

    held_out: HeldOut
    answers: Answers


def answer_all(
    base: BaseModel, sourced: SourcedPrefixes, held_out: Mapping[str | None, HeldOut], progress: Progress
) -> dict[str | None, FloatAnswers]:
    """What a model that is not rounded yet makes of held-out texts under each task and without."""
    by_task = {}
    for task in held_out:
        progress.phase("read text in float32", len(held_out[task].texts), detail=shown_task(task))
        with reference(base, *sourced.under(task)) as model:
            by_task[task] = FloatAnswers(held_out[task], answers(held_out[task], model, progress))
    return by_task


def observe_all(
    base: BaseModel,
    sourced: SourcedPrefixes,
    held_out: Mapping[str | None, HeldOut],
    arithmetic: Arithmetic,
    *,
    max_length: int,
    progress: Progress,
) -> dict[str | None, Expectation]:
    """What the source framework answers under some tasks, and without one for None, and how exact it is itself.

    Args:
        base: the frozen model, in float32; its weights are cast to what the graph computes in.
        sourced: the prefixes.
        held_out: texts for each task that is compared, and for the bare model under None.
        arithmetic: what the graph computes with.
        max_length: positions that prefix and text may take together.
        progress: told of the tasks.

    Raises:
        PrefixExportError: as `observe` and `measured`.
    """
    expected = {}
    for task, texts in held_out.items():
        progress.phase("run the source framework in double precision", detail=shown_task(task))
        expected[task] = observe(base, *sourced.under(task), texts, max_length=max_length, progress=progress)
    cast_weights(base.model, arithmetic.activations)
    for task in held_out:
        progress.phase("run the source framework", len(expected[task].prompts), detail=shown_task(task))
        expected[task] = measured(expected[task], base, *sourced.under(task), arithmetic, progress=progress)
    return expected


def compare_all(
    folder: Path, expected: Mapping[str | None, Expectation], progress: Progress
) -> dict[str | None, TaskParity]:
    """A bundle's graph, its weights as they are rounded but computed with in float32, against what is expected.

    Raises:
        ParityError: they differ.
    """
    progress.phase("open the bundle")
    bundle = Bundle.open(folder)
    check_can_run(bundle.manifest.precision)
    parity = {}
    with _exact_engine(bundle) as engine:
        progress.phase("compare", sum(len(each.prompts) for each in expected.values()))
        for task, expectation in expected.items():
            parity[task] = compare(expectation, engine, task)
            progress.advance(len(expectation.prompts))
    _compare_adapters(bundle, expected, progress)
    return parity


def _compare_adapters(
    bundle: Bundle,
    expected: Mapping[str | None, Expectation],
    progress: Progress,
) -> None:
    """The graph as other programs run it, each task's adapter file active, from no past at all.

    Raises:
        ParityError: logits differ by more than is accepted.
    """
    adapters = {
        task: bundle.root / path for task in bundle.tasks if (path := adapter_path(task)) in bundle.manifest.files
    }
    if not adapters:
        return
    session = Session(bundle.graph_path, is_exact=True)
    for task, adapter in adapters.items():
        progress.phase("compare adapter files", len(expected[task].prompts), detail=shown_task(task))
        for prompt, limit in [(each, kind.limit) for kind in expected[task].by_kind() for each in kind.prompts]:
            ids = np.array([prompt.token_ids], np.int64)
            inputs = {
                contract.INPUT_IDS: ids,
                contract.ATTENTION_MASK: np.ones_like(ids),
                contract.POSITION_IDS: np.arange(ids.size)[None],
            }
            error = largest_difference(run_with_adapter(session, adapter, inputs)[0], prompt.logits)
            progress.advance()
            if not error <= limit:  # NaN never is
                raise ParityError(
                    f"task {task!r}: expected the graph with its adapter file to agree with {expected[task].reference} "
                    f"in double precision within {limit:.1e}, found logits {error:.1e} apart"
                )


def assess_all(
    folder: Path, expected: Mapping[str | None, FloatAnswers], progress: Progress
) -> dict[str | None, TaskQuality]:
    """A bundle as it is run against the float32 model, on the same texts."""
    engine = load(folder, provider=_provider(Bundle.open(folder).manifest.target), prepare=False)
    qualities = {}
    for task, in_float in expected.items():
        progress.phase("read text", len(in_float.held_out.texts), detail=shown_task(task))
        qualities[task] = assess(in_float.held_out, in_float.answers, engine, task, progress)
    return qualities


def certificate(
    parity: Mapping[str | None, TaskParity], quality: Mapping[str | None, TaskQuality], graph_bytes: int
) -> dict[str, object]:
    """The comparisons as the manifest keeps them; quality with the size of graph and weights that it is had for."""
    content = _by_task({task: asdict(result) for task, result in parity.items()})
    if quality:
        rounded = {
            task: {**asdict(result), "perplexity_change": result.perplexity_change} for task, result in quality.items()
        }
        content["quality"] = {"graph_bytes": graph_bytes, **_by_task(rounded)}
    return content


def _by_task(results: Mapping[str | None, dict[str, object]]) -> dict[str, object]:
    bare = {"bare_model": results[None]} if None in results else {}
    return {**bare, "tasks": {task: result for task, result in results.items() if task is not None}}


@contextmanager
def _exact_engine(bundle: Bundle) -> Iterator[Engine]:
    # The bundle's own graph, not what may be kept of it.
    manifest = bundle.manifest
    provider = _provider(manifest.target)
    if manifest.flavour == "portable" or manifest.precision not in BITS:
        session = Session(bundle.graph_path, provider, is_exact=True)
        yield Engine(bundle, OnnxRuntime(bundle, session), manifest.max_length)
        return
    with tempfile.TemporaryDirectory(dir=bundle.root.absolute().parent, prefix=".exact.") as folder:
        graph = Path(folder) / bundle.graph_path.name
        _write_exact_graph(bundle.graph_path, graph)
        yield Engine(bundle, OnnxRuntime(bundle, Session(graph, provider)), manifest.max_length)


def check_can_run(precision: str) -> None:
    """Refuse to verify what only a GPU runs where there is none.

    Raises:
        ExportError: build where a GPU and onnxruntime-gpu are, or with --no-verify.
    """
    if precision == "bf16" and _provider("cuda") == "cpu":
        raise ExportError(
            "precision bf16: expected a GPU and onnxruntime-gpu to verify the graph with, found none that runs here; "
            "build where both are, or with --no-verify"
        )


def _provider(target: str) -> str:
    """What runs a target's graph here: a CPU runs graphs for a GPU in float16, slowly."""
    if target != "cuda":
        return "cpu"
    try:
        check_provider(target)
    except ProviderError:
        return "cpu"
    return target


def _write_exact_graph(source: Path, target: Path) -> None:
    model = onnx.load(source, load_external_data=False)
    as_exact(model)
    target.write_bytes(model.SerializeToString())
    weights = source.with_name(f"{source.name}.data")
    # onnxruntime does not follow a symbolic link out of the graph's folder.
    try:
        os.link(weights, target.with_name(weights.name))
    except OSError:
        shutil.copyfile(weights, target.with_name(weights.name))
