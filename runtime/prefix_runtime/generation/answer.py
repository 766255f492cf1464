"""One prompt's answer as it grows: the tokens, the text, why it ends, and what it took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prefix_runtime.prefix.prefix import Prefix

from .logits_processors import Step
from .results import Chunk, GenerationResult, Metrics
from .rules import GenerationRules
from .sampling import log_softmax, make_sampler
from .text import TextCodec


@dataclass(frozen=True)
class Request:
    """What is to be generated, checked.

    Attributes:
        prompt: token ids, at least one.
        task: that was asked for, or None.
        prefix: the task's.
        max_new_tokens: at the most.
        rules: how tokens are chosen and what ends the text.
        task_selection: seconds that it took to find the prefix.
        preparation: seconds that all of this took.
    """

    prompt: tuple[int, ...]
    task: str | None
    prefix: Prefix | None
    max_new_tokens: int
    rules: GenerationRules
    task_selection: float
    preparation: float

    @property
    def length(self) -> int:
        """Positions that prefix, prompt and new tokens take."""
        return (self.prefix.prefix_length if self.prefix else 0) + len(self.prompt) + self.max_new_tokens

    @property
    def rows(self) -> int:
        """Rows of a batch that it takes: one for each beam."""
        return self.rules.beams.count

    def metrics(self, lease: float, new_tokens: int, times: Sequence[float]) -> Metrics:
        """What it took.

        Args:
            lease: seconds to find a buffer with the task's prefix.
            new_tokens: that were generated.
            times: seconds from the batch's beginning to the end of the prompt and of each decode step.
        """
        return Metrics(
            prompt_length=len(self.prompt),
            prefix_length=self.prefix.prefix_length if self.prefix else 0,
            new_tokens=new_tokens,
            task_selection=self.task_selection + lease,
            time_to_first_token=self.preparation + lease + times[0],
            inter_token_latencies=tuple(np.diff(times).tolist()),
        )


def in_batches(requests: Sequence[Request], rows: int) -> Iterator[list[Request]]:
    """Requests in order, as many together as take so many rows; those with beams apart from those without."""
    batch: list[Request] = []
    for request in requests:
        taken = sum(each.rows for each in batch)
        if batch and (taken + request.rows > rows or (request.rows > 1) != (batch[0].rows > 1)):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


class GrowingAnswer:
    """A request's tokens and text so far; see `decoding.Generation`.

    Args:
        request: what is generated.
        codec: makes text of tokens; None where there is no tokenizer.
        lease: seconds that it took to find a buffer with the task's prefix.
    """

    def __init__(self, request: Request, codec: TextCodec | None, lease: float) -> None:
        self.prompt = request.prompt
        self._request, self._lease = request, lease
        self._rules = request.rules
        self._sampler = make_sampler(request.rules.sampling)
        self._text = codec.growing_text(request.rules.stop, request.prompt) if codec else None
        self._token_ids: list[int] = []
        self._history = np.empty(len(request.prompt) + request.max_new_tokens, np.int64)  # prompt and new ones
        self._history[: len(request.prompt)] = request.prompt
        self._times: list[float] = []  # from the batch's beginning to each token
        self._logprobs: list[float] | None = [] if request.rules.wants_logprobs else None
        self._piece = ""
        self._reason: str | None = None

    @property
    def last_token(self) -> int:
        """The newest token's id."""
        return self._token_ids[-1]

    @property
    def is_finished(self) -> bool:
        """Whether there is no more to come."""
        return self._reason is not None

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the one of the largest logit."""
        is_free = self._logprobs is None and self._rules.processors.idle(self._step) > 0
        return self._rules.sampling.is_greedy and is_free

    @property
    def tokens_left(self) -> int:
        """New tokens that may come, at most, before the end or before a rule changes their logits."""
        left = self._request.max_new_tokens - len(self._token_ids)
        return min(left, max(1, self._rules.processors.idle(self._step)))

    @property
    def _step(self) -> Step:
        length = len(self.prompt) + len(self._token_ids)
        return Step(self._history[:length], len(self.prompt), self._request.max_new_tokens)

    def take(self, logits: np.ndarray) -> None:
        """Choose the next token by its logits [vocab] float32."""
        token_id = self._sampler(self._rules.processors(logits, self._step))
        if self._logprobs is not None:
            self._logprobs.append(float(log_softmax(logits)[token_id]))
        self.accept(token_id)

    def accept(self, token_id: int) -> None:
        """Go on with a token that was chosen."""
        self._history[len(self.prompt) + len(self._token_ids)] = token_id
        self._token_ids.append(token_id)
        self._piece = self._text.push(token_id) if self._text else ""
        self._reason = self._finish_reason(token_id in self._rules.end_tokens)
        if self._text and self._reason not in (None, "stop"):
            self._piece += self._text.finish()

    def note_time(self, seconds: float) -> None:
        """Seconds from the batch's beginning until the newest token was there."""
        self._times.append(seconds)

    def chunk(self) -> Chunk:
        """The newest token and the text that became certain with it; with the last one, the result."""
        return Chunk(self._piece, self.last_token, self.result() if self.is_finished else None)

    def result(self) -> GenerationResult:
        """The answer, once it is finished."""
        assert self._reason is not None  # asked for only then
        text = self._text.text if self._text else None
        return GenerationResult(
            text=text,
            token_ids=tuple(self._token_ids),
            finish_reason=self._reason,
            task=self._request.task,
            metrics=self._request.metrics(self._lease, len(self._token_ids), self._times),
            token_logprobs=None if self._logprobs is None else tuple(self._logprobs),
        )

    def _finish_reason(self, is_end: bool) -> str | None:
        if self._text and self._text.stopped:
            return "stop"
        if is_end:
            return "end_token"
        return "length" if len(self._token_ids) == self._request.max_new_tokens else None
