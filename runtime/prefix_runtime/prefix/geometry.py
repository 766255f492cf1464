"""The shape of a model, as far as a prefix and a key/value buffer care."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefix_runtime.errors import PrefixMismatchError

if TYPE_CHECKING:
    from .prefix import LayerPrefix, Prefix


LEAST_TEXT = 2
"""Positions that a prefix must leave: a token of prompt and a new one."""


@dataclass(frozen=True)
class LayerGeometry:
    """One attention layer: its key/value heads and their size."""

    key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Geometry:
    """The attention layers, context and vocabulary of a model.

    Attributes:
        sites: the layers of each attention site, by the names in `prefix.SITES`. A decoder-only model has "decoder". An
            encoder-decoder also has "cross" and "encoder".
        context_length: positions of the decoder.
        vocab_size: tokens of the vocabulary.
        source_length: positions of the encoder; None for a decoder-only model.
    """

    sites: Mapping[str, tuple[LayerGeometry, ...]]
    context_length: int
    vocab_size: int
    source_length: int | None = None

    @property
    def layers(self) -> tuple[LayerGeometry, ...]:
        """The layers of the decoder's self-attention."""
        return self.sites["decoder"]

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the decoder also attends to a source text."""
        return "cross" in self.sites

    @property
    def values_per_position(self) -> int:
        """Numbers in the keys and values of one position, all layers of the decoder's self-attention together."""
        return sum(2 * layer.key_value_heads * layer.head_dim for layer in self.layers)

    def room(self, prefix: Prefix | None, max_length: int) -> int:
        """Tokens of text that fit behind a prefix, or without one, in `max_length` positions of a buffer."""
        if prefix is None:
            return min(max_length, self.context_length)
        # A prefix takes room in the buffer, and positions of the model where its text begins behind it.
        return min(max_length - prefix.length_at("decoder"), self.context_length - prefix.position_base)

    def check_prefix(
        self, prefix: Prefix, where: str, fingerprint: str | None = None, max_length: int | None = None
    ) -> None:
        """Refuse a prefix that was made for another model.

        Args:
            prefix: to be checked.
            where: names it in messages.
            fingerprint: of the model's weights, or None where only shapes are known.
            max_length: positions that prefix and text may take together; None takes the context.

        Raises:
            PrefixMismatchError: naming what was expected and found, or the fingerprints that differ.
        """
        self._check_sites(prefix, where)
        for site, layers in prefix.sites.items():
            check_layers(self.sites[site], layers, f"{where}: {site}" if self.is_encoder_decoder else where)
        if fingerprint and prefix.base_fingerprint and prefix.base_fingerprint != fingerprint:
            raise PrefixMismatchError(
                f"{where}: made for another base model: expected fingerprint {fingerprint[:20]}…, "
                f"found {prefix.base_fingerprint[:20]}…; use the model that the prefix was trained on"
            )
        self.check_length(prefix.length_at("decoder"), prefix.position_base, where, max_length)

    def _check_sites(self, prefix: Prefix, where: str) -> None:
        sites = sorted(prefix.sites)
        if not self.is_encoder_decoder and sites != ["decoder"]:
            raise PrefixMismatchError(
                f"{where}: expected a prefix for the decoder alone, as this is a decoder-only model, "
                f"found one for {', '.join(sites)}"
            )
        if not sites or not set(sites) <= set(self.sites):
            raise PrefixMismatchError(
                f"{where}: expected a prefix for one or more of {', '.join(sorted(self.sites))}, "
                f"found one for {', '.join(sites) or 'none of them'}"
            )

    def check_length(self, length: int, position_base: int, where: str, max_length: int | None = None) -> None:
        """Refuse a prefix that leaves no room for text, by its length and the position of its first token of text.

        Raises:
            PrefixMismatchError: use a shorter prefix, or a bundle with a larger `max_length`.
        """
        limit = max_length or self.context_length
        if min(limit - length, self.context_length - position_base) < LEAST_TEXT:
            raise PrefixMismatchError(
                f"{where}: expected a prefix that leaves {LEAST_TEXT} of {limit} positions for text, "
                f"found one of length {length}"
            )


def check_layers(
    expected: Sequence[LayerGeometry], layers: Sequence[LayerPrefix], where: str, *, are_all_there: bool = True
) -> None:
    """Refuse the keys and values of other layers than a model's at one attention site, and layers without any.

    Raises:
        PrefixMismatchError: naming the layer, what was expected and what was found.
    """
    if len(layers) != len(expected):
        raise PrefixMismatchError(f"{where}: expected {len(expected)} layers, found {len(layers)}")
    for index, (geometry, layer) in enumerate(zip(expected, layers, strict=True)):
        if layer.key.shape[1] == 0 and are_all_there:
            raise PrefixMismatchError(
                f"{where}: layer {index}: expected a prefix at every layer, as all layers of a graph see the same "
                "positions, found one that was left out"
            )
        for tensor, array in (("key", layer.key), ("value", layer.value)):
            _check_layer(geometry, array.shape, f"{where}: layer {index}, {tensor}")


def _check_layer(expected: LayerGeometry, shape: tuple[int, ...], where: str) -> None:
    heads, _, head_dim = shape
    if heads != expected.key_value_heads:
        raise PrefixMismatchError(f"{where}: expected {expected.key_value_heads} key/value heads, found {heads}")
    if head_dim != expected.head_dim:
        raise PrefixMismatchError(f"{where}: expected head size {expected.head_dim}, found {head_dim}")
