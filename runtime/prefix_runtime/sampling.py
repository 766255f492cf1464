"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .checks import is_finite, is_whole
from .errors import RequestError

Sampler = Callable[[np.ndarray, Sequence[int]], int]
"""Logits [vocab] float32, left as they are, and the token ids so far, to the next token's id."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    The logits pass the settings in this order, as in transformers (5.23, `GenerationMixin._get_logits_processor`).

    Attributes:
        repetition_penalty: divides the positive and multiplies the negative logits of tokens of the prompt and of
            the text so far, 0.001 to 1000; 1 leaves them alone. Keskar et al., "CTRL", 2019.
        temperature: divides the logits; 0 takes the most likely token and ignores what follows.
        top_k: keeps the k most likely tokens; 0 keeps all. Fan et al., 2018.
        top_p: keeps the most likely tokens whose probabilities reach p together; 1 keeps all. Holtzman et al., 2020.
        min_p: keeps tokens at least p times as likely as the most likely; 0 keeps all. Nguyen et al., 2024.
        seed: of the choice; the same seed and the same logits give the same text; None takes a new one every time.

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
        _check("temperature", self.temperature, "0 or more", is_finite(self.temperature) and self.temperature >= 0)
        _check("top_k", self.top_k, "a whole number, 0 or more", is_whole(self.top_k))
        _check("top_p", self.top_p, "above 0 and at most 1", is_finite(self.top_p) and 0 < self.top_p <= 1)
        _check("min_p", self.min_p, "0 to 1", is_finite(self.min_p) and 0 <= self.min_p <= 1)
        penalty = self.repetition_penalty
        # Beyond, logits leave what float32 holds.
        _check("repetition_penalty", penalty, "0.001 to 1000", is_finite(penalty) and 1e-3 <= penalty <= 1e3)
        _check("seed", self.seed, "None or a whole number, 0 or more", self.seed is None or is_whole(self.seed))

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the most likely token is taken as it is."""
        return self.temperature == 0 and self.repetition_penalty == 1


def make_sampler(sampling: Sampling) -> Sampler:
    """A sampler with a random state of its own."""
    if sampling.temperature == 0:
        return lambda logits, token_ids: int(penalize(logits, token_ids, sampling.repetition_penalty).argmax())
    random = np.random.default_rng(sampling.seed)

    def sample(logits: np.ndarray, token_ids: Sequence[int]) -> int:
        ids, probabilities = distribution(logits, token_ids, sampling)
        # An exponential race: p is the chance that time / p comes first. Each token has a time of its own, whatever the
        # settings and the batch, so that a last digit of the logits tips a choice between two at most; in a cumulated
        # sum it would move every boundary.
        times = random.standard_exponential(len(logits))
        return int(ids[(probabilities / times[ids]).argmax()])

    return sample


def distribution(logits: np.ndarray, token_ids: Sequence[int], sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The candidates [n] int64, by id, and their probabilities [n] float64.

    Args:
        logits: [vocab] float32.
        token_ids: of the prompt and the text so far.
        sampling: with a temperature above 0.
    """
    scores = penalize(logits, token_ids, sampling.repetition_penalty).astype(np.float64)
    scores -= scores.max()
    with np.errstate(over="ignore"):  # next to no temperature: all but the most likely go to minus infinity
        scores /= sampling.temperature
    ids = _top_k(scores, sampling.top_k)
    probabilities = _normalized(np.exp(scores[ids]))
    if sampling.top_p < 1:
        ids, probabilities = _keep(ids, probabilities, _nucleus(probabilities, sampling.top_p))
    if sampling.min_p > 0:
        likely = np.flatnonzero(probabilities >= sampling.min_p * probabilities.max())
        ids, probabilities = _keep(ids, probabilities, likely)
    return ids, probabilities


def penalize(logits: np.ndarray, token_ids: Sequence[int], penalty: float) -> np.ndarray:
    """The logits [vocab] with a repetition penalty for each token that occurs in `token_ids`; the input stays."""
    if penalty == 1:
        return logits
    seen = np.unique(np.asarray(token_ids, np.int64))
    penalized = logits.copy()
    penalized[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return penalized


def _top_k(scores: np.ndarray, top_k: int) -> np.ndarray:
    if 0 < top_k < len(scores):
        # As in transformers, ties with the k-th are kept.
        return np.flatnonzero(scores >= np.partition(scores, -top_k)[-top_k])
    return np.arange(len(scores))


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the fewest most likely candidates whose probabilities reach `top_p` together."""
    # What is below this cannot matter: all of it together does not make up the rest. It spares sorting a vocabulary.
    likely = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    size = int(np.searchsorted(probabilities[order].cumsum(), top_p, side="left")) + 1
    return np.sort(order[:size])


def _keep(ids: np.ndarray, probabilities: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids[kept], _normalized(probabilities[kept])


def _normalized(weights: np.ndarray) -> np.ndarray:
    total: np.ndarray = weights / weights.sum()
    return total


def _check(name: str, value: object, expected: str, sound: bool) -> None:
    if not sound:
        raise RequestError(f"{name}: expected {expected}, found {value!r}")
