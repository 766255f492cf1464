"""The exported graph against the source framework: the same prompts, the same answers.

The truth is the source model in double precision, and the framework's own error is the yardstick: see `yardstick`. A
graph passes if its largest error is at most `FACTOR` times the yardstick, or below the floor of its precision. Texts
and random tokens are measured apart, because random tokens can magnify every rounding error tenfold: their yardstick
would accept anything of a text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from prefix_export.errors import ExportError, ParityError
from prefix_export.models import BaseModel
from prefix_export.models.experts import traceable_experts
from prefix_export.prefixes.reference import CacheReference, PrefixSource, Reference, reference
from prefix_export.progress import SILENT, Progress
from prefix_export.tokenizers.held_out import HeldOut
from prefix_runtime import Engine, Prefix, Sampling
from prefix_runtime.generation.logits_processors import LogitsProcessors, Step

from .double_precision import DoublePrecision
from .yardstick import Arithmetic, RoundedCache, largest_difference, own_error

FACTOR = 4
"""An error of the graph may be so many times the yardstick."""

FLOORS = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""An error below this is accepted whatever the yardstick says, by the type of activations."""

_RANDOM_LENGTHS = (1, 7, 33)
_TEXTS = 2
_TEXT_LENGTH = 48
_NEW_TOKENS = 12
_ALONE = 2


@dataclass(frozen=True)
class TaskParity:
    """One task's comparison, over all positions of all prompts.

    Attributes:
        reference: the source framework and its version.
        error: the largest difference of a logit between the graph and the source model in double precision. Texts and
            random tokens have a limit each; this is the error of the kind that comes closest to its limit.
        yardstick: the source framework's own largest difference at the graph's precision, on the same prompts.
        limit: the largest error that is accepted on them.
        greedy_tokens_equal: whether the tokens agree, up to the first tie.
        ties: answers, alone and in a batch, that part where two tokens are closer than twice their prompt's limit,
            because each may be off by it; nothing behind is compared.
        prompts: that were compared.
        text_prompts: of them are text; the others are random tokens.
    """

    reference: str
    error: float
    yardstick: float
    limit: float
    greedy_tokens_equal: bool
    ties: int
    prompts: int
    text_prompts: int

    @property
    def agrees(self) -> bool:
        """Whether the graph may be shipped."""
        return self.greedy_tokens_equal and self.error <= self.limit


@dataclass(frozen=True)
class PromptTruth:
    """What the source framework makes of one prompt.

    Attributes:
        token_ids: the prompt.
        logits: in double precision, [sequence, vocab] float64.
        tokens: greedy ones, in float32, by the model's own generation defaults.
        new_tokens: that were asked for at most; rules about the last token depend on it.
        yardstick: the framework's own error at the graph's precision; NaN until it was measured.
    """

    token_ids: tuple[int, ...]
    logits: np.ndarray
    tokens: tuple[int, ...]
    new_tokens: int
    yardstick: float = float("nan")


@dataclass(frozen=True)
class Expectation:
    """What a reference answers to some prompts, the first `text_prompts` of them text, and a graph's arithmetic."""

    reference: str
    prompts: tuple[PromptTruth, ...]
    text_prompts: int = 0
    arithmetic: Arithmetic = field(default_factory=Arithmetic)

    @property
    def yardstick(self) -> float:
        """The source framework's own largest error, over all prompts."""
        return float(np.max([prompt.yardstick for prompt in self.prompts]))  # not Python's max, which drops a NaN

    @property
    def limit(self) -> float:
        """The largest error that is accepted."""
        return max(FLOORS[self.arithmetic.activations], FACTOR * self.yardstick)

    def by_kind(self) -> list[Expectation]:
        """The same of the texts and of the random tokens; each kind of prompts has a yardstick of its own.

        With a rounded cache all prompts have one. There a single number that is rounded the other way decides, and few
        prompts have few of those.
        """
        if self.arithmetic.cache is not None:
            return [self]
        kinds = self.prompts[: self.text_prompts], self.prompts[self.text_prompts :]
        return [replace(self, prompts=prompts) for prompts in kinds if prompts]


def text_prompts(held_out: HeldOut | None, room: int) -> list[tuple[int, ...]]:
    """The first different beginnings of texts, as far as there is room for them and a new token; none if random."""
    texts = held_out.texts if held_out is not None and held_out.is_text else ()
    beginnings = dict.fromkeys(text.token_ids[: min(_TEXT_LENGTH, room - 1)] for text in texts if room > 1)
    return list(beginnings)[:_TEXTS]


def random_prompts(vocab_size: int, room: int) -> list[tuple[int, ...]]:
    """Random tokens, the same every time; as many as there is room for with a new token."""
    random = np.random.default_rng(0)
    lengths = sorted({min(length, room - 1) for length in _RANDOM_LENGTHS} - {0})
    return [tuple(random.integers(vocab_size, size=length).tolist()) for length in lengths]


def observe(
    base: BaseModel,
    prefix: Prefix | None,
    source: PrefixSource | None,
    held_out: HeldOut | None,
    *,
    max_length: int,
    progress: Progress = SILENT,
) -> Expectation:
    """What the source framework answers under a prefix, or without one; `measured` adds the yardsticks.

    Args:
        base: the frozen model, in float32.
        prefix: as it was folded.
        source: what it was folded from; PEFT's adapters are run by PEFT itself, everything else by
            transformers with the prefix as its cache.
        held_out: texts of the task, of which some become prompts.
        max_length: positions that prefix and text may take together.
        progress: told of each prompt.

    Raises:
        PrefixExportError: the source is an adapter of PEFT's and PEFT is not installed.
        ExportError: the memory at hand does not hold the model's largest weight in double precision.
    """
    room = base.geometry.room(prefix, max_length)
    texts = text_prompts(held_out, room)
    truths = []
    with reference(base, prefix, source) as answers:
        for prompt in (*texts, *random_prompts(base.geometry.vocab_size, room)):
            # The default implementation of experts has no kernel for double precision.
            with _enough_memory(base), traceable_experts(base.model), DoublePrecision():
                logits = _on_disk(answers.logits(prompt))
            count = min(_NEW_TOKENS, room - len(prompt))
            truths.append(PromptTruth(prompt, logits, tuple(answers.greedy(prompt, count)), count))
            progress.advance()
    return Expectation(answers.name, tuple(truths), len(texts))


def measured(
    expectation: Expectation,
    base: BaseModel,
    prefix: Prefix | None,
    source: PrefixSource | None,
    arithmetic: Arithmetic,
    *,
    progress: Progress = SILENT,
) -> Expectation:
    """An expectation with the yardstick of each prompt; see `observe` for the arguments.

    Args:
        expectation: of the same prefix.
        base: the frozen model, its weights in the type of the graph's activations.
        prefix: as of `observe`.
        source: as of `observe`.
        arithmetic: what the graph computes with.
        progress: told of each prompt.

    Raises:
        ParityError: the source framework itself leaves the numbers that the type holds.
    """
    truths = []
    with reference(base, prefix, source) as framework:
        for truth in expectation.prompts:
            answers: Reference = framework
            if arithmetic.cache is not None:
                truth = _with_rounded_cache(truth, base, prefix, arithmetic)  # noqa: PLW2901  # it is meant from here
                jitter = torch.Generator().manual_seed(0)
                answers = CacheReference(base.model, prefix, partial(RoundedCache, arithmetic, jitter))
            own = own_error(answers, base.model, truth.token_ids, truth.logits, arithmetic.activations)
            if not np.isfinite(own):
                raise ParityError(
                    f"{framework.name} in {str(arithmetic.activations).removeprefix('torch.')}: expected finite "
                    "logits, found others: the model leaves the numbers that this type holds; take another --precision"
                )
            truths.append(replace(truth, yardstick=own))
            progress.advance()
    return replace(expectation, prompts=tuple(truths), arithmetic=arithmetic)


def _with_rounded_cache(
    truth: PromptTruth, base: BaseModel, prefix: Prefix | None, arithmetic: Arithmetic
) -> PromptTruth:
    """A truth, changed by what it changes in double precision that keys and values are rounded."""
    rounded = CacheReference(base.model, prefix, partial(RoundedCache, arithmetic))
    with traceable_experts(base.model), DoublePrecision():
        change = rounded.logits(truth.token_ids) - CacheReference(base.model, prefix).logits(truth.token_ids)
    tokens = tuple(rounded.greedy(truth.token_ids, truth.new_tokens))
    return replace(truth, logits=_on_disk(truth.logits + change), tokens=tokens)


def compare(expectation: Expectation, engine: Engine, task: str | None) -> TaskParity:
    """The exported graph's answers against the expected ones.

    Raises:
        ParityError: they do not agree: by how much, and what is accepted.
    """
    prompts, kinds = expectation.prompts, expectation.by_kind()
    error, worst = max(((_error(kind, engine, task), kind) for kind in kinds), key=_share_of_limit)
    ties = {id(prompt): 2 * kind.limit for kind in kinds for prompt in kind.prompts}
    partings = [
        (_parting(prompt, tokens, engine, task), ties[id(prompt)]) for prompt, tokens in _answers(prompts, engine, task)
    ]
    result = TaskParity(
        reference=expectation.reference,
        error=error,
        yardstick=worst.yardstick,
        limit=worst.limit,
        greedy_tokens_equal=all(gap <= tie for gap, tie in partings),
        ties=sum(0 < gap <= tie for gap, tie in partings),
        prompts=len(prompts),
        text_prompts=expectation.text_prompts,
    )
    _refuse_disagreement(task, result, engine.bundle.manifest.cache)
    return result


def _error(expectation: Expectation, engine: Engine, task: str | None) -> float:
    """The largest error of the graph's logits over all prompts."""
    prompts = expectation.prompts
    return float(np.max([largest_difference(engine.logits(each.token_ids, task), each.logits) for each in prompts]))


def _share_of_limit(measured: tuple[float, Expectation]) -> float:
    error, expectation = measured
    return error / expectation.limit if np.isfinite(error) else float("inf")


def _answers(
    prompts: Sequence[PromptTruth], engine: Engine, task: str | None
) -> list[tuple[PromptTruth, tuple[int, ...]]]:
    """The engine's greedy tokens of each prompt in a batch, and of the longest prompts alone too.

    What pads rows on the left may count positions and lengths otherwise.
    """
    greedy = Sampling()
    longest = sorted(prompts, key=lambda prompt: len(prompt.token_ids))[-_ALONE:]
    alone = [
        engine.generate(
            token_ids=prompt.token_ids, task=task, max_new_tokens=prompt.new_tokens, sampling=greedy, num_beams=1
        )
        for prompt in longest
    ]
    together = engine.generate(
        token_ids=[prompt.token_ids for prompt in prompts],
        task=task,
        max_new_tokens=[prompt.new_tokens for prompt in prompts],
        sampling=greedy,
        num_beams=1,
    )
    return [
        (prompt, result.token_ids)
        for ran, results in ((longest, alone), (prompts, together))
        for prompt, result in zip(ran, results, strict=True)
    ]


def _parting(prompt: PromptTruth, tokens: Sequence[int], engine: Engine, task: str | None) -> float:
    """How far apart the engine's logits of the two tokens are where its greedy tokens part from the expected; else 0.

    The model's own generation defaults apply, as they do to the tokens. Two tokens closer than both their accepted
    errors are a tie, which either side may break its way.
    """
    for index, (left, right) in enumerate(zip(prompt.tokens, tokens, strict=False)):
        if left != right:
            text = [*prompt.token_ids, *prompt.tokens[:index]]
            process = LogitsProcessors(engine.generation_defaults(), engine.bundle.manifest.geometry.vocab_size)
            step = Step(np.array(text), len(prompt.token_ids), prompt.new_tokens)
            logits = process(engine.logits(text, task)[-1], step)
            if not np.isfinite(logits[[left, right]]).all():
                return float("inf")  # the defaults forbid one of them
            return max(float(abs(logits[left] - logits[right])), float(np.finfo(np.float32).tiny))
    return 0.0 if len(prompt.tokens) == len(tokens) else float("inf")


@contextmanager
def _enough_memory(base: BaseModel) -> Iterator[None]:
    """Say what double precision needs if the memory does not hold it.

    Raises:
        ExportError
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        largest = max(parameter.numel() for parameter in base.model.parameters())
        raise ExportError(
            f"model {base.name!r}: expected memory for the comparison in double precision, {largest * 8 / 1e9:.1f} GB "
            "for the largest weight, found too little; free memory, or build with --no-verify"
        ) from error


def _on_disk(array: np.ndarray) -> np.ndarray:
    """A copy in a file without a name: logits of many tasks are many gigabytes, and are looked at once."""
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, array.dtype, "w+", shape=array.shape)
    mapped[:] = array
    return mapped


def _refuse_disagreement(task: str | None, result: TaskParity, cache: str) -> None:
    if not result.agrees:
        what = "the bare model" if task is None else f"task {task!r}"
        tokens = "equal" if result.greedy_tokens_equal else "different"
        advice = (
            "; where keys and values go beyond the scales of 8 bits, more and other text widens them: --held-out, or "
            "build with --cache fp32"
        )
        raise ParityError(
            f"{what}: expected the exported graph to agree with {result.reference} in greedy tokens, and its logits "
            f"with double precision within {result.limit:.1e} ({result.reference} itself: {result.yardstick:.1e}), "
            f"found {result.error:.1e} and {tokens} tokens" + (advice if cache == "int8" else "")
        )
