"""Prefixes one after another: labels of an attribute before a general prefix, a system text before a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from prefix_runtime.errors import CompositionError

from .prefix import TEXT_HAS_BEGUN, LayerPrefix, Prefix

SEPARATOR = "+"
"""Between the tasks in a name that stands for several; no task's own name has it."""

TABLE, PLACE, GENERAL = "control_table", "control_place", "general"
"""Metadata of a part of Control Prefixes: the attribute that it is a label of, or the general prefix' own name; a whole
number by which parts stand one after another, the general one last."""

_BIAS = "relative_position_bias"


def concatenated(prefixes: Sequence[Prefix]) -> Prefix:
    """Prefixes of one model one after another along their length, the first one first.

    Parts of Control Prefixes stand in the order that they were trained in, whatever their order here.

    Text begins behind all of them where it begins behind each, else at position 0. Keys stay what they are: those of a
    model with rotary positions keep the rotation that each was trained or computed with, so that the positions of
    prefixes that were computed from text repeat, as in PEFT's `compose_cartridge_adapters` (0.21.2); a prefix does not
    attend to those before it.

    A text keeps the start token that it was computed with, wherever it stands. So the runtime adds no start token to a
    prompt behind prefixes of which one is a text, whatever their order: `"e2e+text"` and `"text+e2e"` take the same
    tokens. Of several texts each keeps its own start token.

    Raises:
        CompositionError: they are of different models, sites or kinds; or parts of Control Prefixes that are not one
            general prefix and at most one label of each attribute.
    """
    ordered = _in_order(prefixes)
    length = sum(prefix.prefix_length for prefix in ordered)
    joined = combined(ordered, lambda arrays: np.concatenate(arrays, 1), length)
    if ordered[0].metadata.get(TABLE) is None:
        return joined
    tables = "+".join(prefix.metadata[TABLE] for prefix in ordered)
    kept = {name: text for name, text in joined.metadata.items() if name != PLACE}
    return replace(joined, metadata={**kept, TABLE: tables})


def _in_order(prefixes: Sequence[Prefix]) -> Sequence[Prefix]:
    """Prefixes as they are, but parts of Control Prefixes by their places.

    Source: jordiclive/ControlPrefixes, `get_prompt_multiple_prefix`: one label of each attribute before the general
    prefix.
    """
    if all(TABLE not in prefix.metadata for prefix in prefixes):
        return prefixes
    by_place: dict[int, Prefix] = {}
    for index, prefix in enumerate(prefixes):
        where = f"prefix {index + 1} of {len(prefixes)}"
        table, place = prefix.metadata.get(TABLE, "of something else"), prefix.metadata.get(PLACE, "")
        if not (place.isascii() and place.isdecimal() and len(place) < 5):
            raise CompositionError(
                f"{where}: expected single parts of Control Prefixes, all at once, found one {table!r}"
            )
        if int(place) in by_place:
            raise CompositionError(
                f"{where}: expected one general prefix of Control Prefixes and at most one label of each attribute, "
                f"found a second of {table!r}"
            )
        by_place[int(place)] = prefix
    ordered = [by_place[place] for place in sorted(by_place)]
    if ordered[-1].metadata[TABLE] != GENERAL:
        raise CompositionError(
            f"expected the general prefix of Control Prefixes ({GENERAL}) among its labels, found "
            f"{', '.join(prefix.metadata[TABLE] for prefix in ordered)} alone"
        )
    sources = {prefix.source.sha256 for prefix in ordered if prefix.source is not None}
    if len(sources) > 1:
        raise CompositionError(f"expected parts of one checkpoint of Control Prefixes, found them of {len(sources)}")
    return ordered


def combined(prefixes: Sequence[Prefix], combine: Callable[[Sequence[np.ndarray]], np.ndarray], length: int) -> Prefix:
    """Prefixes that go together made one, layer by layer.

    Args:
        prefixes: of one model.
        combine: one array of the same key, or value, of each prefix, [num_key_value_heads, prefix_length, head_dim].
        length: of the result; its text begins behind it, or at 0 where it does with each.

    Raises:
        CompositionError: see `check_composable`.
    """
    check_composable(prefixes)
    first = prefixes[0]
    sites = {
        site: tuple(
            LayerPrefix(combine([layer.key for layer in layers]), combine([layer.value for layer in layers]))
            for layers in zip(*(prefix.sites[site] for prefix in prefixes), strict=True)
        )
        for site in first.sites
    }
    return Prefix(
        sites,
        length if first.position_base else 0,
        base_fingerprint=next((each.base_fingerprint for each in prefixes if each.base_fingerprint), None),
        metadata=_metadata(prefixes),
    )


def _metadata(prefixes: Sequence[Prefix]) -> dict[str, str]:
    """The first one's, but text has begun where any of them is a text."""
    has_begun = any(prefix.metadata.get(TEXT_HAS_BEGUN) == "true" for prefix in prefixes)
    return {**prefixes[0].metadata, **({TEXT_HAS_BEGUN: "true"} if has_begun else {})}


def check_composable(prefixes: Sequence[Prefix]) -> None:
    """Refuse prefixes that make no sense together.

    Raises:
        CompositionError: fewer than two; soft prompts or heads among them; different models, shapes, types or places of
            the first token of text.
    """
    if len(prefixes) < 2:
        raise CompositionError(f"expected at least two prefixes to compose, found {len(prefixes)}")
    first = prefixes[0]
    for index, prefix in enumerate(prefixes):
        where = f"prefix {index + 1} of {len(prefixes)}"
        if prefix.embeddings is not None or prefix.head:
            what = "a soft prompt" if prefix.embeddings is not None else "a head"
            raise CompositionError(f"{where}: expected keys and values alone, found {what}, of which there can be one")
        if _shapes(prefix) != _shapes(first):
            raise CompositionError(f"{where}: expected sites and layers as the first one's, found others")
        if prefix.dtype != first.dtype:
            raise CompositionError(f"{where}: expected {first.dtype} as the first one's, found {prefix.dtype}")
        if (prefix.position_base == 0) != (first.position_base == 0):
            place = "at position 0" if first.position_base == 0 else "behind the prefix"
            raise CompositionError(
                f"{where}: expected text to begin {place}, as with the first one, found otherwise; trained so, they "
                "have no position in common"
            )
        if prefix.metadata.get(_BIAS) != first.metadata.get(_BIAS):
            raise CompositionError(f"{where}: expected relative positions counted as the first one's, found otherwise")
        fingerprints = {each.base_fingerprint for each in (first, prefix)} - {None}
        bases = {each.metadata.get("base_model") for each in (first, prefix)} - {None}
        if len(fingerprints) > 1 or (not fingerprints and len(bases) > 1):
            raise CompositionError(f"{where}: expected one base model, found another than the first one's")


def _shapes(prefix: Prefix) -> dict[str, list[tuple[int, int, bool]]]:
    """Heads and head size of each layer of each site, and whether it has a prefix at all."""
    return {
        site: [(layer.key.shape[0], layer.key.shape[2], layer.key.shape[1] > 0) for layer in layers]
        for site, layers in prefix.sites.items()
    }
