"""The weighted average of prefixes. The runtime's `composition` concatenates them, because devices need that too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefix_runtime import CompositionError, Prefix
from prefix_runtime.prefix.composition import TABLE, check_composable, combined


def average(prefixes: Sequence[Prefix], weights: Sequence[float] | None = None) -> Prefix:
    """The weighted average of prefixes of equal shape and equal text position.

    Args:
        prefixes: at least two prefixes.
        weights: one weight for each prefix; their sum must not be 0. They are divided by it. None weighs all equally.

    Returns:
        The average; text begins at the same position as with each of the prefixes.

    Raises:
        CompositionError: the prefixes differ in model, sites, kind or length, or the weights do not fit them; the
            message says which.
    """
    check_composable(prefixes)
    shares = np.array([1.0] * len(prefixes) if weights is None else weights, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        whole = shares.sum()
    fits = len(shares) == len(prefixes) and np.isfinite([*shares, whole]).all() and whole != 0
    if not fits:
        raise CompositionError(
            f"weights: expected {len(prefixes)} numbers whose sum is a number but not 0, found "
            f"{', '.join(map(str, shares.tolist()))}"
        )
    tables = sorted({prefix.metadata.get(TABLE, "") for prefix in prefixes})
    if len(tables) > 1:
        raise CompositionError(
            "average: expected labels of one attribute of Control Prefixes, or none of them, found "
            f"{', '.join(table or 'another prefix' for table in tables)}"
        )
    lengths = sorted({prefix.prefix_length for prefix in prefixes})
    if len(lengths) > 1:
        raise CompositionError(f"average: expected prefixes of one length, found {', '.join(map(str, lengths))}")
    shares = shares / whole

    def mixed(arrays: Sequence[np.ndarray]) -> np.ndarray:
        mixture: np.ndarray = np.einsum("i,i...->...", shares, np.stack(arrays).astype(np.float64))
        return mixture.astype(arrays[0].dtype)

    return combined(prefixes, mixed, lengths[0])
