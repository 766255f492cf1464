"""What changes the logits before a token is chosen, in transformers' order.

Source: transformers 5.23, `generation/logits_process.py`, and `GenerationMixin._get_logits_processor` for the order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .generation_config import GenerationDefaults

_FOREVER = 1 << 62
"""More tokens than any text has."""


@dataclass(frozen=True)
class Step:
    """Where a generation is when its next token is chosen.

    Attributes:
        token_ids: [n] int64, of the prompt and the new text so far; a prefix has no ids and does not count.
        prompt_length: tokens of the prompt, at least one.
        max_new_tokens: new tokens at most.
    """

    token_ids: np.ndarray
    prompt_length: int
    max_new_tokens: int

    @property
    def new_tokens(self) -> int:
        """Tokens that were generated so far."""
        return len(self.token_ids) - self.prompt_length


class LogitsProcessor(ABC):
    """One rule."""

    @abstractmethod
    def __call__(self, scores: np.ndarray, step: Step) -> np.ndarray:
        """The new scores [vocab] float32; the given ones may be changed in place."""

    def idle(self, step: Step) -> int:  # noqa: ARG002  # most rules always act
        """How many of the next tokens it certainly has no influence on."""
        return 0


class LogitsProcessors:
    """All rules of a request, in order.

    Args:
        defaults: the model's, with what the request overrides.
        vocab_size: of the model.
    """

    def __init__(self, defaults: GenerationDefaults, vocab_size: int) -> None:
        self._rules = tuple(_in_order(defaults, vocab_size))

    def __call__(self, logits: np.ndarray, step: Step) -> np.ndarray:
        """The processed logits [vocab] float32; the given ones stay as they are."""
        rules = [rule for rule in self._rules if not rule.idle(step)]
        if not rules:
            return logits
        scores = logits.copy()
        for rule in rules:
            scores = rule(scores, step)
        return scores

    def idle(self, step: Step) -> int:
        """How many of the next tokens no rule has an influence on."""
        return min((rule.idle(step) for rule in self._rules), default=_FOREVER)


def _in_order(defaults: GenerationDefaults, vocab_size: int) -> Iterator[LogitsProcessor]:
    ends = _within(defaults.end_tokens, vocab_size)
    yield from _of_runs(defaults, vocab_size)
    yield from _of_ends(defaults, ends)
    if defaults.suppress_tokens:
        yield Suppress(_within(defaults.suppress_tokens, vocab_size))
    if defaults.begin_suppress_tokens:
        # transformers counts a forced first token as part of the beginning.
        place = 0 if defaults.forced_bos_token_id is None else 1
        yield SuppressFirst(_within(defaults.begin_suppress_tokens, vocab_size), place)


def _of_runs(defaults: GenerationDefaults, vocab_size: int) -> Iterator[LogitsProcessor]:
    """What depends on the tokens that were there."""
    endings = {(end,) for end in defaults.end_tokens}
    bad_words = [run for run in defaults.bad_words_ids if run not in endings]
    if defaults.sequence_bias:
        yield SequenceBias(defaults.sequence_bias, vocab_size)
    if defaults.encoder_repetition_penalty != 1:
        yield RepetitionPenalty(1 / defaults.encoder_repetition_penalty, of_prompt=True)
    if defaults.repetition_penalty != 1:
        yield RepetitionPenalty(defaults.repetition_penalty)
    if defaults.no_repeat_ngram_size:
        yield NoRepeatNGram(defaults.no_repeat_ngram_size)
    if defaults.encoder_no_repeat_ngram_size:
        yield NoRepeatNGram(defaults.encoder_no_repeat_ngram_size, of_prompt=True)
    if bad_words:
        yield SequenceBias([(run, -math.inf) for run in bad_words], vocab_size)


def _of_ends(defaults: GenerationDefaults, ends: np.ndarray) -> Iterator[LogitsProcessor]:
    """What depends on how far the text is, and what makes numbers of logits that are none in between."""
    if len(ends) and (defaults.min_length or defaults.min_new_tokens):
        yield MinLength(defaults.min_length, defaults.min_new_tokens, ends)
    if defaults.forced_bos_token_id is not None:
        yield ForcedFirst(defaults.forced_bos_token_id)
    if defaults.forced_eos_token_id:
        yield ForcedLast(np.array(defaults.forced_eos_token_id))
    if defaults.remove_invalid_values:
        yield RemoveInvalid()
    if defaults.exponential_decay_length_penalty is not None:
        yield ExponentialDecay(*defaults.exponential_decay_length_penalty, ends)


def _within(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """The ids [n] int64 that the vocabulary has, each once."""
    return np.array(sorted({token_id for token_id in token_ids if token_id < vocab_size}), np.int64)


class SequenceBias(LogitsProcessor):
    """Adds a number to the logit of a run's last token, if the run's other tokens were the last ones of the text.

    Minus infinity forbids a run. Source: `SequenceBiasLogitsProcessor`, `NoBadWordsLogitsProcessor`.
    """

    def __init__(self, biases: Sequence[tuple[tuple[int, ...], float]], vocab_size: int) -> None:
        self._always = np.zeros(vocab_size, np.float32)
        by_length: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for run, bias in dict(biases).items():  # of equal runs the last one counts
            if len(run) == 1:
                self._always[run[0]] = bias
            else:
                by_length.setdefault(len(run) - 1, []).append((run, bias))
        self._behind = [
            (np.array([run for run, _ in group]), np.array([bias for _, bias in group], np.float32))
            for group in by_length.values()
        ]

    def __call__(self, scores: np.ndarray, step: Step) -> np.ndarray:
        """See `LogitsProcessor`."""
        bias = self._always.copy()
        for runs, biases in self._behind:
            before = runs.shape[1] - 1
            if before <= len(step.token_ids):
                matching = (runs[:, :-1] == step.token_ids[-before:]).all(1)
                np.add.at(bias, runs[matching, -1], biases[matching])
        scores += bias
        return scores


class RepetitionPenalty(LogitsProcessor):
    """Divides positive and multiplies negative logits of tokens that were there, each once; or of the prompt's alone.

    Source: `RepetitionPenaltyLogitsProcessor`, `EncoderRepetitionPenaltyLogitsProcessor`; Keskar et al., "CTRL", 2019.
    """

    def __init__(self, penalty: float, *, of_prompt: bool = False) -> None:
        self._penalty, self._of_prompt = penalty, of_prompt

    def __call__(self, scores: np.ndarray, step: Step) -> np.ndarray:
        """See `LogitsProcessor`."""
        seen = step.token_ids[: step.prompt_length] if self._of_prompt else step.token_ids
        seen_scores = scores[
            seen
        ]  # a token that occurs twice is read twice before it is written: its penalty counts once
        scores[seen] = np.where(seen_scores < 0, seen_scores * self._penalty, seen_scores / self._penalty)
        return scores


class NoRepeatNGram(LogitsProcessor):
    """Forbids a token that would make a run of `size` tokens come again: one of the whole text, or of the prompt.

    Source: `NoRepeatNGramLogitsProcessor`, `EncoderNoRepeatNGramLogitsProcessor`.
    """

    def __init__(self, size: int, *, of_prompt: bool = False) -> None:
        self._size, self._of_prompt = size, of_prompt

    def __call__(self, scores: np.ndarray, step: Step) -> np.ndarray:
        """See `LogitsProcessor`."""
        text = step.token_ids
        searched = text[: step.prompt_length] if self._of_prompt else text
        if len(searched) >= self._size:
            runs = sliding_window_view(searched, self._size)
            again = (runs[:, :-1] == text[len(text) + 1 - self._size :]).all(1)
            scores[runs[again, -1]] = -np.inf
        return scores


class MinLength(LogitsProcessor):
    """Forbids end tokens until the text is long enough; `min_new_tokens`, if there is one, goes before `min_length`.

    Source: `MinLengthLogitsProcessor`, `MinNewTokensLengthLogitsProcessor`, and which of them counts
    `GenerationMixin._prepare_generated_length`.
    """

    def __init__(self, min_length: int, min_new_tokens: int | None, ends: np.ndarray) -> None:
        self._min_length, self._min_new_tokens, self._ends = min_length, min_new_tokens, ends

    def __call__(self, scores: np.ndarray, step: Step) -> np.ndarray:  # noqa: ARG002  # it is idle at other places
        """See `LogitsProcessor`."""
        scores[self._ends] = -np.inf
        return scores

    def idle(self, step: Step) -> int:
        """See `LogitsProcessor`."""
        least = self._min_length - step.prompt_length if self._min_new_tokens is None else self._min_new_tokens
        return 0 if step.new_tokens < least else _FOREVER


class ForcedFirst(LogitsProcessor):
    """Makes a token the second one of the text: the first new one behind a prompt of one token.

    Source: `ForcedBOSTokenLogitsProcessor`.
    """

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id

    def __call__(self, scores: np.ndarray, step: Step) -> np.ndarray:  # noqa: ARG002  # it is idle at other places
        """See `LogitsProcessor`."""
        return _only(scores, self._token_id)

    def idle(self, step: Step) -> int:
        """See `LogitsProcessor`."""
        return 0 if len(step.token_ids) == 1 else _FOREVER


class ForcedLast(LogitsProcessor):
    """Makes the last token that `max_new_tokens` allows one of these. Source: `ForcedEOSTokenLogitsProcessor`."""

    def __init__(self, token_ids: np.ndarray) -> None:
        self._token_ids = token_ids

    def __call__(self, scores: np.ndarray, step: Step) -> np.ndarray:  # noqa: ARG002  # it is idle at other places
        """See `LogitsProcessor`."""
        return _only(scores, self._token_ids)

    def idle(self, step: Step) -> int:
        """See `LogitsProcessor`."""
        return step.max_new_tokens - 1 - step.new_tokens


class RemoveInvalid(LogitsProcessor):
    """Makes 0 of what is no number, and the largest numbers of infinities. Source: `InfNanRemoveLogitsProcessor`."""

    def __call__(self, scores: np.ndarray, step: Step) -> np.ndarray:  # noqa: ARG002  # as the other rules
        """See `LogitsProcessor`."""
        numbers: np.ndarray = np.nan_to_num(scores, copy=False)
        return numbers


class ExponentialDecay(LogitsProcessor):
    """Makes end tokens more likely with every token behind the first `start` new ones.

    Source: `ExponentialDecayLengthPenalty`.
    """

    def __init__(self, start: int, factor: float, ends: np.ndarray) -> None:
        self._start, self._factor, self._ends = start, factor, ends

    def __call__(self, scores: np.ndarray, step: Step) -> np.ndarray:
        """See `LogitsProcessor`."""
        end_scores = scores[self._ends]
        with np.errstate(over="ignore", invalid="ignore"):  # a forbidden token is minus infinity, and stays
            growth = np.power(np.float64(self._factor), step.new_tokens - self._start) - 1
            grown = end_scores + np.abs(end_scores) * np.float32(growth)
        # In a long text the logit leaves what float32 holds; the largest number can still be sampled.
        grown = np.minimum(grown, np.finfo(np.float32).max)
        scores[self._ends] = np.where(np.isfinite(end_scores), grown, end_scores)
        return scores

    def idle(self, step: Step) -> int:
        """See `LogitsProcessor`."""
        return max(0, self._start + 1 - step.new_tokens)


class Suppress(LogitsProcessor):
    """Forbids tokens. Source: `SuppressTokensLogitsProcessor`."""

    def __init__(self, token_ids: np.ndarray) -> None:
        self._token_ids = token_ids

    def __call__(self, scores: np.ndarray, step: Step) -> np.ndarray:  # noqa: ARG002  # as the other rules
        """See `LogitsProcessor`."""
        scores[self._token_ids] = -np.inf
        return scores


class SuppressFirst(Suppress):
    """Forbids tokens as the first new one; behind a prompt of one token as the one at `place`.

    Source: `SuppressTokensAtBeginLogitsProcessor`.
    """

    def __init__(self, token_ids: np.ndarray, place: int) -> None:
        super().__init__(token_ids)
        self._place = place

    def idle(self, step: Step) -> int:
        """See `LogitsProcessor`."""
        left = (self._place if step.prompt_length == 1 else 0) - step.new_tokens
        return left if left >= 0 else _FOREVER


def _only(scores: np.ndarray, token_ids: np.ndarray | int) -> np.ndarray:
    """Scores that leave these tokens alone, equally likely."""
    scores.fill(-np.inf)
    scores[token_ids] = 0
    return scores
