"""Tests whether numbers still have the distribution that training began with: independent, normal or uniform.

Training changes the distribution: the deviation grows, a few numbers become large, and uniform numbers leave their
bounds. The tests need many numbers; with fewer they answer False.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MANY = 10_000
_SAMPLE = 1 << 20
"""Size of the sample for the moments: enough to measure a deviation to one thousandth."""
_OUTSIDE = 1e-3
"""Fraction of a bound by which rounding may exceed it."""

DEVIATION = 0.02
"""Standard deviation with which most models in transformers begin (`initializer_range`)."""

UNTRAINED = "its numbers still have the distribution that {framework} begins with: it may be untrained"
"""The warning for the user."""


def is_normal(array: np.ndarray, deviation: float, many: int = _MANY) -> bool:
    """Whether the numbers look independent and normal with mean 0 and this deviation, as in a new `torch.nn.Embedding`.

    Args:
        array: the numbers, in any shape.
        deviation: the standard deviation.
        many: numbers that are needed; False with fewer.
    """
    if array.size < many:
        return False
    numbers = _sampled(array) / deviation
    # For n standard normal numbers, mean, deviation and kurtosis differ from 0, 1 and 3 by about 1, 0.7 and 5, each
    # divided by sqrt(n).
    spread = 4 / np.sqrt(numbers.size)
    mean, scatter = numbers.mean(), numbers.std()
    if abs(mean) >= spread or abs(scatter - 1) >= spread:
        return False
    fourth = ((numbers - mean) ** 4).mean() / scatter**4
    return bool(abs(fourth - 3) < 5 * spread)


def is_uniform(array: np.ndarray, bound: float, many: int = _MANY) -> bool:
    """Whether the numbers look independent and uniform from -bound to bound; see `is_normal`."""
    if array.size < many or float(np.abs(array).max()) > bound * (1 + _OUTSIDE):
        return False
    numbers = _sampled(array) / bound
    spread = 4 / np.sqrt(numbers.size)
    return bool(abs(numbers.mean()) < spread and abs(numbers.std() * np.sqrt(3) - 1) < spread)


def is_linear(layers: Sequence[tuple[np.ndarray, np.ndarray]], deviation: float | None = None) -> bool:
    """Whether the weights and biases of all layers still have the distribution that training began with.

    Args:
        layers: weight [outputs, inputs] and bias [outputs] of each layer of an MLP.
        deviation: a number tests for normal weights with this deviation and biases of 0, as models in transformers
            begin. None tests for both uniform within 1 / sqrt(inputs), as `torch.nn.Linear` (2.13) begins.
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
