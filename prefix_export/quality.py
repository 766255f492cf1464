"""What rounding weights or keys and values costs in quality: the float32 model against the engine, on held-out text.

Both read the same text, token by token as it is written. Of a text with a tab, what stands before it is read and not
counted: a prompt. Perplexity is the exponential of the mean negative log likelihood of the tokens that count; greedy
agreement is the part of them in whose place both models would have written the same most likely token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefix_runtime import Engine, Prefix

from .errors import PrefixExportError
from .models import BaseModel
from .progress import SILENT, Progress
from .reference import Reference

_MOST_TOKENS = 2048  # of all texts together, for each task: what a processor reads in seconds
_LONGEST = 256
_RANDOM_TEXTS = 8
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Text:
    """Token ids, and how many of them are a prompt, which is read and not counted; at least one."""

    token_ids: tuple[int, ...]
    prompt: int


@dataclass(frozen=True)
class HeldOut:
    """Texts that nothing was trained on.

    Attributes:
        name: of the file.
        texts: that are compared.
        is_text: False where they are random, for want of a tokenizer: then perplexity means nothing.
    """

    name: str
    texts: tuple[Text, ...]
    is_text: bool


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


def read_held_out(path: Path | None, base: BaseModel, prefix: Prefix | None, max_length: int) -> HeldOut:
    """The held-out texts in a file, a line each; where none is given, the demo's lighthouses.

    Args:
        path: a text file in UTF-8.
        base: the model, whose tokenizer encodes them; without one they are random tokens.
        prefix: that they are to be read under: no text is longer than what it leaves room for.
        max_length: positions that prefix and text may take together.

    Raises:
        PrefixExportError: the file cannot be read, or holds no line with tokens that count.
    """
    length = min(_LONGEST, base.geometry.room(prefix, max_length))
    if base.tokenizer is None:
        if path is not None:
            raise PrefixExportError(f"{path}: expected a model with a tokenizer to read text with, found none")
        random = np.random.default_rng(0).integers(base.geometry.vocab_size, size=(_RANDOM_TEXTS, length))
        return HeldOut("random tokens", tuple(Text(tuple(row), 1) for row in random.tolist()), is_text=False)
    encoded = [_encoded(line, base.tokenizer, length) for line in _lines(path)]
    texts = _first_tokens([text for text in encoded if len(text.token_ids) > text.prompt])
    if not texts:
        raise PrefixExportError(
            f"held-out text {path or 'of the demo'}: expected lines of at least two tokens, found none"
        )
    return HeldOut(path.name if path else "the demo's lighthouses", texts, is_text=True)


def _encoded(line: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Text:
    prompt, tab, answer = line.partition("\t")
    counted_from = max(1, len(tokenizer.encode(prompt))) if tab else 1
    ids = tokenizer.encode(prompt + answer)
    # Where there is no room for all of it, the prompt's beginning goes first.
    cut = max(0, len(ids) - length)
    return Text(tuple(ids[cut:]), max(1, counted_from - cut))


def _lines(path: Path | None) -> list[str]:
    source = resources.files(__package__) / "held_out.txt" if path is None else path
    if path is not None and path.stat().st_size > _MOST_BYTES:
        raise PrefixExportError(f"{path}: expected at most {_MOST_BYTES >> 20} MB of text, found more")
    try:
        return [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise PrefixExportError(f"{path}: expected UTF-8 text, found {error}") from error


def _first_tokens(texts: Sequence[Text]) -> tuple[Text, ...]:
    kept: list[Text] = []
    for text in texts:
        if kept and sum(len(other.token_ids) for other in kept) + len(text.token_ids) > _MOST_TOKENS:
            break
        kept.append(text)
    return tuple(kept)


def answers(held_out: HeldOut, reference: Reference, progress: Progress = SILENT) -> Answers:
    """What the float32 model makes of the texts; each text is a step."""
    return _answers(held_out, reference.logits, progress)


def assess(
    held_out: HeldOut, expected: Answers, engine: Engine, task: str | None, progress: Progress = SILENT
) -> TaskQuality:
    """What the engine makes of the texts, against what the float32 model made of them; each text is a step."""
    found = _answers(held_out, lambda text: engine.logits(text, task), progress)
    same = expected.choices == found.choices
    perplexities = (math.exp(found.loss), math.exp(expected.loss)) if held_out.is_text else (None, None)
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
