"""What a generation gives back, and what it took."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Metrics:
    """What a generation took.

    Attributes:
        prompt_length: tokens of the prompt.
        prefix_length: positions of the task's prefix, 0 without one.
        new_tokens: tokens generated.
        task_selection: seconds to find the task's prefix and a buffer that holds it.
        time_to_first_token: seconds from the request to the first token, the task's selection included.
        inter_token_latencies: seconds of each decode step: one less than the new tokens, or more with beams.
    """

    prompt_length: int
    prefix_length: int
    new_tokens: int
    task_selection: float
    time_to_first_token: float
    inter_token_latencies: tuple[float, ...]

    @property
    def inter_token_latency(self) -> float:
        """Seconds of a decode step, the median; NaN where there was none."""
        return median(self.inter_token_latencies) if self.inter_token_latencies else float("nan")

    @property
    def seconds(self) -> float:
        """Seconds from the request to the last token, without what the caller did in between."""
        return self.time_to_first_token + sum(self.inter_token_latencies)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over seconds."""
        return self.new_tokens / self.seconds


@dataclass(frozen=True)
class GeneratedSequence:
    """One of the best texts of a beam search.

    Attributes:
        text, token_ids, finish_reason, token_logprobs: as in `GenerationResult`.
        score: the sum of its tokens' log-probabilities, as the rules left them, over its length to `length_penalty`.
    """

    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: str
    score: float
    token_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class GenerationResult:
    """What a prompt was answered with.

    Attributes:
        text: of the new tokens, without special tokens, ending before a stop string; None where the bundle has no
            tokenizer.
        token_ids: the new tokens, an end token included.
        finish_reason: "end_token", "stop" (a stop string) or "length" (`max_new_tokens`, or the context is full).
        task: that it was generated under.
        metrics: what it took.
        token_logprobs: each new token's log-probability by the model alone, before rules; None unless asked for.
        sequences: of a beam search the best texts, `num_return_sequences` or as many as there are. The first one is
            this result. Empty without beams.
    """

    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: str
    task: str | None
    metrics: Metrics
    token_logprobs: tuple[float, ...] | None = None
    sequences: tuple[GeneratedSequence, ...] = ()

    @property
    def score(self) -> float | None:
        """The score of the best beam; None without beams."""
        return self.sequences[0].score if self.sequences else None


@dataclass(frozen=True)
class Chunk:
    """One step of a stream.

    Attributes:
        text: whole characters that became certain with this token; often empty.
        token_id: the new token.
        result: the whole result, with the last chunk; None before.
    """

    text: str
    token_id: int
    result: GenerationResult | None


@dataclass(frozen=True)
class TargetScore:
    """How likely a target is behind a prompt.

    Attributes:
        token_ids: of the target.
        token_logprobs: the log-probability of each of them behind the prompt and the target's earlier tokens.
    """

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        """The target's log-probability: the sum of its tokens'."""
        return sum(self.token_logprobs)
