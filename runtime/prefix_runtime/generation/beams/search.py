"""The beam search of one request: its beams, and the best texts that have ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from operator import attrgetter, itemgetter

import numpy as np

from prefix_runtime.generation.answer import Request
from prefix_runtime.generation.detokenizer import NO_CHARACTER
from prefix_runtime.generation.logits_processors import Step
from prefix_runtime.generation.results import GeneratedSequence, GenerationResult
from prefix_runtime.generation.sampling import log_softmax, none_left
from prefix_runtime.generation.text import TextCodec


@dataclass(frozen=True)
class Fork:
    """An order to continue one slot from the text of another.

    Attributes:
        source: the slot to copy from. It continues too.
        target: the slot to copy to.
        shared: how many first tokens, the prompt's included, both slots have in common. They need no copy.
    """

    source: int
    target: int
    shared: int


@dataclass(frozen=True)
class _Beam:
    """A text of new tokens.

    Attributes:
        slot: the slot that runs it.
        token_ids: its new tokens.
        logprobs: the log-probability of each new token, before rules.
        total: the sum of the log-probabilities after rules, added in float32 as in transformers.
    """

    slot: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0


@dataclass(frozen=True)
class _Ended:
    """A beam that ended, why, and its score."""

    beam: _Beam
    reason: str
    score: float


class BeamSearch:
    """A request's beams so far. Each runs in one of `width` slots: rows of a batch, whichever these are.

    1. A beam's log-probabilities pass the request's rules; the beam's total is added.
    2. The candidates are the best of all beams' next tokens: `width` of them for each end token and `width` more, at
       least twice as many as beams.
    3. A candidate ends with an end token, a stop string, or the last new token. If it is among the first `width`, it is
       kept with its score: its total over its length to the power `length_penalty`. The best `width` of those stay.
    4. The best `width` candidates that do not end are the next beams.
    5. The search is over when none goes on. If `width` texts have ended, it is over with `early_stopping`, or if the
       best beam's score is not above the worst of theirs: its score at this length, or for "never" with a
       `length_penalty` above 0 at the greatest length.

    Source: transformers 5.23, `GenerationMixin._beam_search`. It fills up beams and results that there are not with
    scores of -1e9; here there are fewer.

    Args:
        request: what is generated.
        codec: makes text of tokens; None where there is no tokenizer.
        lease: seconds that it took to find a buffer with the task's prefix.

    Attributes:
        prompt: token ids.
        width: slots, as many as beams at the most.
        next_tokens: what each slot is given next; one without a beam is given any token.
        is_finished: whether there is no more to come.
    """

    def __init__(self, request: Request, codec: TextCodec | None, lease: float) -> None:
        self.prompt, self.width = request.prompt, request.rows
        self._request, self._codec, self._lease = request, codec, lease
        self._rules = request.rules
        self._times: list[float] = []
        # What each slot has been given, prompt first: [slots, tokens].
        self._history = np.zeros((self.width, len(self.prompt) + request.max_new_tokens), np.int64)
        self._history[:, : len(self.prompt)] = self.prompt
        self._beams = [_Beam(slot=0)]
        self._ended: list[_Ended] = []
        self.next_tokens = [0] * self.width
        self.is_finished = False

    def advance(self, logits: Sequence[np.ndarray]) -> list[Fork]:
        """Choose the next beams.

        Args:
            logits: [vocab] float32 for each slot; after the prompt, only for the first slot.

        Returns:
            The copies to make. No slot is both copied from and copied to.

        Raises:
            RequestError: the rules leave no token, and no text has ended.
        """
        going_on: list[_Beam] = []
        for rank, beam in enumerate(self._candidates(logits)):
            reason = self._finish_reason(beam)
            if reason is None:
                going_on.append(beam)
            elif rank < self.width:
                self._ended.append(_Ended(beam, reason, self._score(beam.total, len(beam.token_ids))))
        self._ended = sorted(self._ended, key=attrgetter("score"), reverse=True)[: self.width]
        if not (going_on or self._ended):
            raise none_left()
        self.is_finished = self._is_over(going_on)
        return [] if self.is_finished else self._place(going_on[: self.width])

    def note_time(self, seconds: float) -> None:
        """Record how many seconds the batch needed up to the newest tokens."""
        self._times.append(seconds)

    def result(self) -> GenerationResult:
        """The result. Call it when the search has finished."""
        sequences = tuple(map(self._sequence, self._ended[: self._rules.beams.returned]))
        best = sequences[0]
        return GenerationResult(
            text=best.text,
            token_ids=best.token_ids,
            finish_reason=best.finish_reason,
            task=self._request.task,
            metrics=self._request.metrics(self._lease, len(best.token_ids), self._times),
            token_logprobs=best.token_logprobs,
            sequences=sequences,
        )

    @property
    def _length(self) -> int:
        """The number of tokens in each slot: the prompt and the new ones."""
        return len(self.prompt) + len(self._beams[0].token_ids)

    def _candidates(self, logits: Sequence[np.ndarray]) -> list[_Beam]:
        """The best continuations, the best first; of equal ones the better beam's, and of a beam's the smaller id."""
        count = max(2, 1 + len(self._rules.end_tokens)) * self.width
        continuations = (self._continuations(beam, logits[beam.slot], count) for beam in self._beams)
        best = sorted(chain.from_iterable(continuations), key=itemgetter(0), reverse=True)[:count]
        return [
            _Beam(beam.slot, (*beam.token_ids, token_id), (*beam.logprobs, logprob), total)
            for total, logprob, token_id, beam in best
        ]

    def _continuations(self, beam: _Beam, logits: np.ndarray, count: int) -> Iterator[tuple[float, float, int, _Beam]]:
        """The best next tokens of a beam: the total with it, its log-probability before rules, its id, the beam."""
        logprobs = log_softmax(logits)
        step = Step(self._history[beam.slot, : self._length], len(self.prompt), self._request.max_new_tokens)
        scores = self._rules.processors(logprobs, step)
        if self._rules.defaults.renormalize_logits:
            scores = log_softmax(scores)
        totals = scores + beam.total
        best = best_of(totals, count)
        return zip(totals[best].tolist(), logprobs[best].tolist(), best.tolist(), repeat(beam))

    def _finish_reason(self, beam: _Beam) -> str | None:
        if self._rules.stop and self._codec is not None and self._is_stopped(self._codec, beam):
            return "stop"
        if beam.token_ids[-1] in self._rules.end_tokens:
            return "end_token"
        return "length" if len(beam.token_ids) == self._request.max_new_tokens else None

    def _is_stopped(self, codec: TextCodec, beam: _Beam) -> bool:
        """Whether a stop string is met with the newest token; none was before."""
        # A string with U+FFFD is looked for in the text, which begins with the first new token.
        newest = beam.token_ids if any(NO_CHARACTER in each for each in self._rules.stop) else beam.token_ids[-1:]
        before = [*self.prompt, *beam.token_ids[: len(beam.token_ids) - len(newest)]]
        text = codec.growing_text(self._rules.stop, before)
        for token_id in newest:
            text.push(token_id)
        return text.stopped

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self._rules.beams.length_penalty)

    def _is_over(self, going_on: Sequence[_Beam]) -> bool:
        beams = self._rules.beams
        if not going_on:
            return True
        if len(self._ended) < self.width:
            return False
        is_open = beams.early_stopping == "never" and beams.length_penalty > 0
        length = self._request.max_new_tokens if is_open else len(going_on[0].token_ids)
        return beams.early_stopping is True or not self._score(going_on[0].total, length) > self._ended[-1].score

    def _place(self, going_on: Sequence[_Beam]) -> list[Fork]:
        """Give each beam a slot. The best continuation of a slot keeps it, so that few slots are copied."""
        length = self._length
        staying = {beam.slot: beam for beam in reversed(going_on)}
        free = (slot for slot in range(self.width) if slot not in staying)
        placed, forks = [], []
        for beam in going_on:
            slot = beam.slot
            if staying[slot] is not beam:
                slot = next(free)
                shared = _shared(self._history[slot, :length], self._history[beam.slot, :length])
                if shared < length:
                    forks.append(Fork(beam.slot, slot, shared))
            placed.append(replace(beam, slot=slot))
        for fork in forks:
            self._history[fork.target, fork.shared : length] = self._history[fork.source, fork.shared : length]
        for beam in placed:
            self.next_tokens[beam.slot] = beam.token_ids[-1]
        self._history[:, length] = self.next_tokens
        self._beams = placed
        return forks

    def _sequence(self, ended: _Ended) -> GeneratedSequence:
        beam, text = ended.beam, None
        if self._codec is not None:
            growing = self._codec.growing_text(self._rules.stop, self.prompt)
            for token_id in beam.token_ids:
                growing.push(token_id)
            growing.finish()
            text = growing.text
        logprobs = beam.logprobs if self._rules.wants_logprobs else None
        return GeneratedSequence(text, beam.token_ids, ended.reason, ended.score, logprobs)


def best_of(scores: np.ndarray, count: int) -> np.ndarray:
    """The places of the largest of scores [n] float32, the largest first, of equal ones the first; none of -inf."""
    if count < len(scores):
        least = np.partition(scores, -count)[-count]
        likely = np.flatnonzero((scores >= least) & (scores > -np.inf))
    else:
        likely = np.flatnonzero(scores > -np.inf)
    order: np.ndarray = likely[np.argsort(-scores[likely], kind="stable")[:count]]
    return order


def _shared(left: np.ndarray, right: np.ndarray) -> int:
    """How many first tokens two histories [n] have in common."""
    differing = np.flatnonzero(left != right)
    return int(differing[0]) if len(differing) else len(left)
