"""Composing prefix files: the weighted average, and both commands on files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prefix_export.prefixes.compose import average
from prefix_runtime import CompositionError, LayerPrefix, Prefix
from prefix_runtime.prefix.composition import concatenated


def prefix(length=4, seed=0, base=None):
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal((2, length, 8)).astype(np.float32) for _ in range(4)]
    return Prefix({"decoder": (LayerPrefix(*arrays[:2]), LayerPrefix(*arrays[2:]))}, length if base is None else base)


@pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ((1, 3), (0.25, 0.75)), ((2, -1), (2, -1))])
def test_the_average_is_weighed(weights, shares):
    left, right = prefix(seed=1), prefix(seed=2)
    found = average([left, right], weights)
    assert found.position_base == 4
    for layer, first, second in zip(*(each.sites["decoder"] for each in (found, left, right)), strict=True):
        for part in ("key", "value"):
            expected = shares[0] * getattr(first, part) + shares[1] * getattr(second, part)
            np.testing.assert_allclose(getattr(layer, part), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("others", "weights", "message"),
    [
        ([prefix(5)], None, "average: expected prefixes of one length, found 4, 5"),
        ([prefix()], (1,), "weights: expected 2 numbers"),
        ([prefix()], (1, -1), "weights: expected 2 numbers whose sum is a number but not 0"),
        ([prefix()], (1e308, 1e308), r"weights: expected 2 numbers .* found 1e\+308, 1e\+308"),
        ([prefix()], (1, float("nan")), "weights: expected 2 numbers"),
        ([prefix(base=0)], None, "expected text to begin behind the prefix"),
        ([], None, "expected at least two prefixes"),
    ],
)
def test_what_cannot_be_averaged_is_refused(others, weights, message):
    with pytest.raises(CompositionError, match=message):
        average([prefix(), *others], weights)


def test_labels_of_one_attribute_are_averaged_and_others_are_not():
    cats = [replace(prefix(seed=seed), metadata={"control_table": "cats", "control_place": "0"}) for seed in (1, 2)]
    assert average(cats).metadata == cats[0].metadata
    with pytest.raises(CompositionError, match=r"expected labels of one attribute .* found another prefix, cats"):
        average([cats[0], prefix()])


def test_concatenation_is_the_runtimes():
    assert concatenated([prefix(), prefix(5)]).prefix_length == 9
