"""Whether numbers are still distributed as a training run began with them: independent, normal or uniform.

Training moves numbers apart: their deviation grows, few of them go far, and what was uniform leaves its bounds. What is
told here is what many numbers tell; of few of them nothing is said.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MANY = 10_000
_SAMPLE = 1 << 20
"""Numbers that moments are taken of: they tell a deviation to a thousandth."""
_OUTSIDE = 1e-3
"""Of a bound, by which rounding may leave it."""

DEVIATION = 0.02
"""Of the normal numbers that most models of transformers begin with (`initializer_range`)."""

UNTRAINED = "its numbers are still distributed as {framework} begins with them: it may have been trained hardly or not"
"""What a user is told."""


def is_normal(array: np.ndarray, deviation: float, many: int = _MANY) -> bool:
    """Whether many numbers are as independent normal ones of mean 0 and this deviation, as `torch.nn.Embedding` has.

    Args:
        array: of any shape.
        deviation: the standard deviation.
        many: numbers below which nothing is said.
    """
    if array.size < many:
        return False
    numbers = _sampled(array) / deviation
    # Of n standard normal numbers these differ from 0, 1 and 3 by about 1, 0.7 and 5 over the root of n.
    spread = 4 / np.sqrt(numbers.size)
    mean, scatter = numbers.mean(), numbers.std()
    if abs(mean) >= spread or abs(scatter - 1) >= spread:
        return False
    fourth = ((numbers - mean) ** 4).mean() / scatter**4
    return bool(abs(fourth - 3) < 5 * spread)


def is_uniform(array: np.ndarray, bound: float, many: int = _MANY) -> bool:
    """Whether many numbers are as independent ones that are uniform from -bound to bound; see `is_normal`."""
    if array.size < many or float(np.abs(array).max()) > bound * (1 + _OUTSIDE):
        return False
    numbers = _sampled(array) / bound
    spread = 4 / np.sqrt(numbers.size)
    return bool(abs(numbers.mean()) < spread and abs(numbers.std() * np.sqrt(3) - 1) < spread)


def is_linear(layers: Sequence[tuple[np.ndarray, np.ndarray]], deviation: float | None = None) -> bool:
    """Whether the weights [outputs, inputs] and biases [outputs] of all layers are as they begin.

    Args:
        layers: of an MLP.
        deviation: of normal weights beside biases of 0, as models of transformers begin; None asks for both uniform
            within 1 / sqrt(inputs), as `torch.nn.Linear` (2.13) begins.
    """
    if deviation is not None:
        return all(is_normal(weight, deviation) and not bias.any() for weight, bias in layers)
    for weight, bias in layers:
        bound = 1 / np.sqrt(weight.shape[1])
        if not is_uniform(weight, bound) or float(np.abs(bias).max()) > bound * (1 + _OUTSIDE):
            return False
    return True


def _sampled(array: np.ndarray) -> np.ndarray:
    numbers = array.reshape(-1)
    step = max(1, numbers.size // _SAMPLE)
    sample: np.ndarray = numbers[::step].astype(np.float64)
    return sample
