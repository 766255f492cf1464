"""Several prefixes of one model to one: one after another, or their weighted average."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prefix_runtime import CompositionError, LayerPrefix, Prefix
from prefix_runtime.composition import check_composable, concatenated

__all__ = ["average", "concatenate"]


def concatenate(prefixes: Sequence[Prefix]) -> Prefix:
    """Prefixes one after another along their length; see `prefix_runtime.composition.concatenated`.

    Raises:
        CompositionError: they are of different models, sites or kinds.
    """
    return concatenated(prefixes)


def average(prefixes: Sequence[Prefix], weights: Sequence[float] | None = None) -> Prefix:
    """The weighted average of prefixes of equal shape; text begins where it does behind each of them.

    Args:
        prefixes: at least two.
        weights: one each, not all 0; divided by their sum. None weighs all alike.

    Raises:
        CompositionError: they are of different models, sites, kinds or lengths, or the weights do not fit.
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
    lengths = sorted({prefix.prefix_length for prefix in prefixes})
    if len(lengths) > 1:
        raise CompositionError(f"average: expected prefixes of one length, found {', '.join(map(str, lengths))}")
    shares = shares / whole
    first = prefixes[0]

    def mixed(part: Callable[[Prefix], np.ndarray]) -> np.ndarray:
        arrays = [part(prefix).astype(np.float64) for prefix in prefixes]
        found: np.ndarray = np.einsum("i,i...->...", shares, np.stack(arrays)).astype(first.dtype)
        return found

    sites = {
        site: tuple(
            LayerPrefix(
                mixed(lambda prefix, site=site, index=index: prefix.sites[site][index].key),  # type: ignore[misc]
                mixed(lambda prefix, site=site, index=index: prefix.sites[site][index].value),  # type: ignore[misc]
            )
            for index in range(len(layers))
        )
        for site, layers in first.sites.items()
    }
    return Prefix(
        sites,
        first.position_base,
        base_fingerprint=next((each.base_fingerprint for each in prefixes if each.base_fingerprint), None),
        metadata=first.metadata,
    )
