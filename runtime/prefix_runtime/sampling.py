"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import RequestError

Sampler = Callable[[np.ndarray, Sequence[int]], int]
"""Logits [vocab] float32, left as they are, and the token ids so far, to the next token's id."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    The logits pass the settings in this order, as in transformers (5.23, `GenerationMixin._get_logits_processor`).

    Attributes:
        repetition_penalty: divides the positive and multiplies the negative logits of tokens of the prompt and of
            the text so far; 1 leaves them alone. Keskar et al., "CTRL", 2019.
        temperature: divides the logits; 0 takes the most likely token and ignores what follows.
        top_k: keeps the k most likely tokens; 0 keeps all. Fan et al., 2018.
        top_p: keeps the most likely tokens whose probabilities reach p together; 1 keeps all. Holtzman et al., 2020.
        min_p: keeps tokens at least p times as likely as the most likely; 0 keeps all. Nguyen et al., 2024.
        seed: of the choice; the same seed gives the same text; None takes a new one every time.

    Raises:
        RequestError: a setting outside of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "0 or more", 0 <= self.temperature < float("inf"))
        _check("top_k", self.top_k, "a whole number, 0 or more", self.top_k >= 0 and self.top_k == int(self.top_k))
        _check("top_p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1)
        _check("min_p", self.min_p, "0 to 1", 0 <= self.min_p <= 1)
        _check("repetition_penalty", self.repetition_penalty, "above 0", 0 < self.repetition_penalty < float("inf"))
        _check("seed", self.seed, "None or a whole number, 0 or more", self.seed is None or self.seed >= 0)


def make_sampler(sampling: Sampling) -> Sampler:
    """A sampler with a random state of its own."""
    if sampling.temperature == 0:
        return lambda logits, token_ids: int(penalize(logits, token_ids, sampling.repetition_penalty).argmax())
    random = np.random.default_rng(sampling.seed)

    def sample(logits: np.ndarray, token_ids: Sequence[int]) -> int:
        ids, probabilities = distribution(logits, token_ids, sampling)
        # One uniform number a token, whatever the settings: the same seed stays comparable between them.
        chosen = int(np.searchsorted(probabilities.cumsum(), random.random(), side="right"))
        return int(ids[min(chosen, len(ids) - 1)])

    return sample


def distribution(logits: np.ndarray, token_ids: Sequence[int], sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The candidates [n] int64 and their probabilities [n] float64, the most likely first.

    Args:
        logits: [vocab] float32.
        token_ids: of the prompt and the text so far.
        sampling: with a temperature above 0.
    """
    scores = penalize(logits, token_ids, sampling.repetition_penalty).astype(np.float64) / sampling.temperature
    ids = _most_likely_first(scores, sampling.top_k)
    probabilities = np.exp(scores[ids] - scores[ids[0]])
    probabilities /= probabilities.sum()
    kept = _nucleus_size(probabilities, sampling.top_p)
    probabilities = probabilities[:kept]
    kept = int(np.count_nonzero(probabilities >= sampling.min_p * probabilities[0]))
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    return ids[:kept], probabilities


def penalize(logits: np.ndarray, token_ids: Sequence[int], penalty: float) -> np.ndarray:
    """The logits [vocab] with a repetition penalty for each token that occurs in `token_ids`; the input stays."""
    if penalty == 1:
        return logits
    seen = np.unique(np.asarray(token_ids, np.int64))
    penalized = logits.copy()
    penalized[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return penalized


def _most_likely_first(scores: np.ndarray, top_k: int) -> np.ndarray:
    if 0 < top_k < len(scores):
        # As in transformers, ties with the k-th are kept.
        smallest = np.partition(scores, -top_k)[-top_k]
        candidates = np.flatnonzero(scores >= smallest)
        return candidates[np.argsort(-scores[candidates], kind="stable")]
    return np.argsort(-scores, kind="stable")


def _nucleus_size(probabilities: np.ndarray, top_p: float) -> int:
    if top_p >= 1:
        return len(probabilities)
    return int(np.searchsorted(probabilities.cumsum(), top_p, side="left")) + 1


def _check(name: str, value: object, expected: str, sound: bool) -> None:
    if not sound:
        raise RequestError(f"{name}: expected {expected}, found {value}")
