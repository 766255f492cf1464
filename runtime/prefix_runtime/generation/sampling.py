"""How the next token is chosen from the processed logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prefix_runtime.checks import is_finite, is_whole
from prefix_runtime.errors import RequestError

Sampler = Callable[[np.ndarray], int]
"""Processed logits [vocab] float32, left as they are, to the next token's id."""

_TOP_H_CANDIDATES = 100
"""Tokens that top-h looks at, as in transformers."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    The logits pass the settings in the order of this list, as in transformers (5.23,
    `GenerationMixin._get_logits_processor`).

    Attributes:
        repetition_penalty: divides the positive and multiplies the negative logits of tokens of the prompt and of
            the text so far, 0.001 to 1000; 1 leaves them alone, None takes the model's own. Keskar et al., 2019.
        temperature: divides the logits; 0 takes the most likely token and ignores what follows.
        top_h: keeps the most likely tokens up to this part of the entropy; 0 keeps all. arXiv:2509.02510.
        top_k: keeps the k most likely tokens; 0 keeps all. Fan et al., 2018.
        top_p: keeps the most likely tokens whose probabilities reach p together; 1 keeps all. Holtzman et al., 2020.
        min_p: keeps tokens at least p times as likely as the most likely; 0 keeps all. Nguyen et al., 2024.
        typical_p: keeps the tokens nearest to the expected information whose probabilities reach p together; 1 keeps
            all. Meister et al., 2022.
        epsilon_cutoff: keeps tokens of at least this probability; 0 keeps all. Hewitt et al., 2022.
        eta_cutoff: the same with a limit that falls with the entropy; 0 keeps all. Hewitt et al., 2022.
        seed: of the choice; the same seed and the same logits give the same text; None takes a new one every time.

    Raises:
        RequestError: a setting outside of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    top_h: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "0 or more", is_finite(self.temperature) and self.temperature >= 0)
        _check("top_k", self.top_k, "a whole number, 0 or more", is_whole(self.top_k))
        _check("top_p", self.top_p, "above 0 and at most 1", is_finite(self.top_p) and 0 < self.top_p <= 1)
        for name in ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            value = getattr(self, name)
            _check(name, value, "0 to 1", is_finite(value) and 0 <= value <= 1)
        penalty = self.repetition_penalty
        # Beyond, logits leave what float32 holds.
        sound = penalty is None or (is_finite(penalty) and 1e-3 <= penalty <= 1e3)
        _check("repetition_penalty", penalty, "0.001 to 1000", sound)
        _check("seed", self.seed, "None or a whole number, 0 or more", self.seed is None or is_whole(self.seed))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


def make_sampler(sampling: Sampling) -> Sampler:
    """A sampler with a random state of its own.

    The sampler raises `RequestError` if no token is left to choose from.
    """
    if sampling.is_greedy:
        return _most_likely
    random = np.random.default_rng(sampling.seed)

    def sample(scores: np.ndarray) -> int:
        ids, probabilities = distribution(scores, sampling)
        # An exponential race: p is the chance that time / p comes first. Each token has a time of its own, whatever the
        # settings and the batch, so that a last digit of the logits tips a choice between two at most; in a cumulated
        # sum it would move every boundary.
        times = random.standard_exponential(len(scores))
        return int(ids[(probabilities / times[ids]).argmax()])

    return sample


def _most_likely(scores: np.ndarray) -> int:
    token_id = int(scores.argmax())
    if scores[token_id] == -np.inf:
        raise none_left()
    return token_id


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The log-probabilities [vocab] float32 of logits [vocab] float32, which are left as they are."""
    with np.errstate(invalid="ignore"):  # infinite logits, which a rule may take out
        scores: np.ndarray = logits - logits.max()
        scores -= np.log(np.exp(scores).sum())
    return scores


def distribution(scores: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The candidates [n] int64, by id, and their probabilities [n] float64.

    Args:
        scores: processed logits [vocab] float32.
        sampling: with a temperature above 0.

    Raises:
        RequestError: the largest logit is infinite or no number.
    """
    scaled = scores.astype(np.float64)
    highest = scaled.max()
    if not np.isfinite(highest):
        raise none_left()
    scaled -= highest
    with np.errstate(over="ignore"):  # next to no temperature: all but the most likely go to minus infinity
        scaled /= sampling.temperature
    ids = np.flatnonzero(scaled > -np.inf)
    if sampling.top_h > 0:
        ids = _top_h(scaled, ids, sampling.top_h)
    ids = _top_k(scaled, ids, sampling.top_k)
    probabilities = _normalized(np.exp(scaled[ids]))
    for cut in _cuts(sampling):
        kept = cut(probabilities)
        ids, probabilities = ids[kept], _normalized(probabilities[kept])
    return ids, probabilities


def none_left() -> RequestError:
    """What a request is refused with whose rules forbid every token."""
    return RequestError(
        "expected a token to choose, found that the logits and the rules in force leave none; see suppress_tokens, "
        "bad_words_ids and no_repeat_ngram_size of the request and of generation_config.json"
    )


def _cuts(sampling: Sampling) -> list[Callable[[np.ndarray], np.ndarray]]:
    """What makes indices of candidates, ascending, of their probabilities [n], in order."""
    cuts: list[Callable[[np.ndarray], np.ndarray]] = []
    if sampling.top_p < 1:
        cuts.append(lambda p: _nucleus(p, sampling.top_p))
    if sampling.min_p > 0:
        cuts.append(lambda p: np.flatnonzero(p >= sampling.min_p * p.max()))
    if sampling.typical_p < 1:
        cuts.append(lambda p: _typical(p, sampling.typical_p))
    if sampling.epsilon_cutoff > 0:
        cuts.append(lambda p: _at_least(p, sampling.epsilon_cutoff))
    if sampling.eta_cutoff > 0:
        cuts.append(lambda p: _at_least(p, _eta(p, sampling.eta_cutoff)))
    return cuts


def _top_k(scores: np.ndarray, ids: np.ndarray, top_k: int) -> np.ndarray:
    if 0 < top_k < len(ids):
        # As in transformers, ties with the k-th are kept.
        likely: np.ndarray = ids[scores[ids] >= np.partition(scores[ids], -top_k)[-top_k]]
        return likely
    return ids


def _top_h(scores: np.ndarray, ids: np.ndarray, top_h: float) -> np.ndarray:
    """The ids, ascending, of the most likely candidates whose entropy is at most this part of all of it."""
    most = ids[np.argsort(-scores[ids], kind="stable")[:_TOP_H_CANDIDATES]]
    terms = _information(_normalized(np.exp(scores[most])))
    kept = terms.cumsum() <= terms.sum() * top_h
    kept[0] = True
    return np.sort(most[kept])


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the fewest most likely candidates whose probabilities reach `top_p` together."""
    # What is below this cannot matter: all of it together does not make up the rest. It spares sorting a vocabulary.
    likely = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    size = int(np.searchsorted(probabilities[order].cumsum(), top_p, side="left")) + 1
    return np.sort(order[:size])


def _typical(probabilities: np.ndarray, typical_p: float) -> np.ndarray:
    """Indices, ascending, of the candidates nearest to the entropy whose probabilities reach `typical_p` together."""
    with np.errstate(divide="ignore"):  # one of no probability is infinitely far
        distance = np.abs(-np.log(probabilities) - _information(probabilities).sum())
    order = np.argsort(distance, kind="stable")
    reached = np.searchsorted(probabilities[order].cumsum(), typical_p, side="left")
    return np.flatnonzero(distance <= distance[order[min(int(reached), len(order) - 1)]])


def _at_least(probabilities: np.ndarray, limit: float) -> np.ndarray:
    """Indices, ascending, of candidates of at least this probability, and of the most likely in any case."""
    return np.flatnonzero((probabilities >= limit) | (probabilities == probabilities.max()))


def _eta(probabilities: np.ndarray, epsilon: float) -> float:
    return float(min(epsilon, np.sqrt(epsilon) * np.exp(-_information(probabilities).sum())))


def _information(probabilities: np.ndarray) -> np.ndarray:
    """Each candidate's part of the entropy [n]; of one that never comes 0."""
    terms = np.zeros_like(probabilities)
    comes = probabilities > 0
    terms[comes] = -probabilities[comes] * np.log(probabilities[comes])
    return terms


def _normalized(weights: np.ndarray) -> np.ndarray:
    total: np.ndarray = weights / weights.sum()
    return total


def _check(name: str, value: object, expected: str, sound: bool) -> None:
    if not sound:
        raise RequestError(f"{name}: expected {expected}, found {value!r}")
