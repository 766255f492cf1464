"""What rounding weights or keys and values costs in quality: the float32 model against the engine, on held-out text.

Both read the same text, token by token as it is written. Of a text with a tab, what stands before it is read and not
counted: a prompt. Perplexity is the exponential of the mean negative log likelihood of the tokens that count; greedy
agreement is the part of them in whose place both models would have written the same most likely token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from prefix_export.prefixes.reference import Reference
from prefix_export.progress import SILENT, Progress
from prefix_export.tokenizers.held_out import HeldOut
from prefix_runtime import Engine


@dataclass(frozen=True)
class Answers:
    """What a model makes of held-out texts: its choice in place of each token that counts, and their mean loss."""

    choices: np.ndarray
    loss: float


@dataclass(frozen=True)
class TaskQuality:
    """One task's comparison with float32.

    Attributes:
        held_out: the name of the texts.
        positions: tokens that were counted.
        greedy_agreement: the part of them in whose place the most likely token is the same.
        perplexity, reference_perplexity: of the engine and of the float32 model; None without a tokenizer.
    """

    held_out: str
    positions: int
    greedy_agreement: float
    perplexity: float | None
    reference_perplexity: float | None

    @property
    def perplexity_change(self) -> float | None:
        """The perplexity's change as a part of the float32 model's; None without a tokenizer."""
        before, after = self.reference_perplexity, self.perplexity
        return after / before - 1 if before and after else None


def answers(held_out: HeldOut, reference: Reference, progress: Progress = SILENT) -> Answers:
    """What the float32 model makes of the texts; each text is a step."""
    return _answers(held_out, reference.logits, progress)


def assess(
    held_out: HeldOut, expected: Answers, engine: Engine, task: str | None, progress: Progress = SILENT
) -> TaskQuality:
    """What the engine makes of the texts, against what the float32 model made of them; each text is a step."""
    answers = _answers(held_out, lambda text: engine.logits(text, task), progress)
    same = expected.choices == answers.choices
    perplexities = (math.exp(answers.loss), math.exp(expected.loss)) if held_out.is_text else (None, None)
    return TaskQuality(held_out.name, len(same), float(same.mean()), *perplexities)


def _answers(held_out: HeldOut, model: Callable[[Sequence[int]], np.ndarray], progress: Progress) -> Answers:
    choices, losses = [], []
    for text in held_out.texts:
        before = model(text.token_ids)[text.prompt - 1 : -1]  # what stands in the place of each token that counts
        choices.append(before.argmax(1))
        losses.append(_losses(before, text.token_ids[text.prompt :]))
        progress.advance()
    return Answers(np.concatenate(choices), float(np.concatenate(losses).mean()))


def _losses(logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """The negative log likelihood [n] float64 of tokens by the logits [n, vocab] in their places."""
    scores = logits.astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    chosen = np.take_along_axis(scores, np.array(tokens)[:, None], 1)[:, 0]
    losses: np.ndarray = np.log(np.exp(scores).sum(1)) - chosen
    return losses
