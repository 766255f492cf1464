"""The second and third step of a build: answers of the model in float, then its rounded weights.

Weights are rounded in place. So `round_weights` takes what `read_in_float` returns, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from prefix_export.models import BaseModel
from prefix_export.progress import Progress
from prefix_export.quantize.calibrate import cache_scales
from prefix_export.quantize.modules import QuantizedModel
from prefix_export.tokenizers.held_out import HeldOut, read_held_out
from prefix_export.verify.all_tasks import (
    FloatAnswers,
    answer_all,
    observe_all,
)
from prefix_export.verify.parity import Expectation
from prefix_runtime import LayerPrefix, Prefix

from .folding import FoldedModel
from .plan import arithmetic
from .request import BuildRequest


@dataclass(frozen=True)
class ModelInFloat:
    """A model whose weights are not rounded yet, and what it answers so.

    Attributes:
        folded: the model and its prefixes.
        texts: of each task and of the bare model.
        measured: the texts that scales of an int8 cache are measured on.
        answers: of the texts that quality is measured on; empty if nothing is compared with float32.
    """

    folded: FoldedModel
    texts: Mapping[str | None, HeldOut]
    measured: Mapping[str | None, HeldOut]
    answers: Mapping[str | None, FloatAnswers]


@dataclass(frozen=True)
class RoundedModel:
    """A model whose weights have the values that the graph computes with.

    Attributes:
        folded: the model and its prefixes.
        quantized: the weights in 8 or 4 bits, or None.
        scales: of an int8 cache, or None.
        expected: what the graph is to answer, by task; empty without `verify`.
        in_float: what the model answered before; see `ModelInFloat`.
    """

    folded: FoldedModel
    quantized: QuantizedModel | None
    scales: tuple[LayerPrefix, ...] | None
    expected: Mapping[str | None, Expectation]
    in_float: Mapping[str | None, FloatAnswers]


def read_in_float(folded: FoldedModel, progress: Progress) -> ModelInFloat:
    """Read held-out texts, and take the float32 model's answers if they are compared.

    Raises:
        ExportError: a text cannot be read.
    """
    request = folded.checked.request
    texts = _held_out(request, folded.base, folded.prefixes, folded.max_length)
    measured, compared = _split(request, texts)
    takes_answers = request.verify and request.needs_text
    answers = answer_all(folded.base, folded.sourced, compared, progress) if takes_answers else {}
    return ModelInFloat(folded, texts, measured, answers)


def round_weights(in_float: ModelInFloat, progress: Progress) -> RoundedModel:
    """Round the model's weights in place, measure an int8 cache's scales, and take the answers that are expected.

    Raises:
        ExportError: the weights cannot be rounded.
    """
    folded = in_float.folded
    base, checked = folded.base, folded.checked
    settings = checked.quantization
    quantized = QuantizedModel(base.model, settings, progress) if settings else None
    scales = None
    if checked.request.cache == "int8":
        scales = cache_scales(base, folded.prefixes, in_float.measured, progress)
    expected: Mapping[str | None, Expectation] = {}
    if checked.request.verify:
        exact = arithmetic(checked.plan, scales)
        expected = observe_all(
            base, folded.sourced, in_float.texts, exact, max_length=folded.max_length, progress=progress
        )
    return RoundedModel(folded, quantized, scales, expected, in_float.answers)


def conditions(mode: str, tasks: Iterable[str]) -> tuple[str | None, ...]:
    """What a graph answers under: each task, and where it holds none the bare model."""
    return tuple(tasks) if mode == "bake" else (None, *tasks)


def _held_out(
    request: BuildRequest, base: BaseModel, prefixes: Mapping[str, Prefix], max_length: int
) -> dict[str | None, HeldOut]:
    """The texts of each task and of the bare model: prompts of the comparison, and what rounding is measured on."""
    if not (request.verify or request.needs_text):
        return {}
    known = conditions(request.mode, prefixes)
    files = {task: request.held_out.get(task, request.held_out.get(None)) for task in known}
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
