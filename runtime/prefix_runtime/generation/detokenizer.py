"""Token ids back to text: all together, and one by one as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .tokenizer_file import components, refusing_failures

NO_CHARACTER = "\ufffd"
"""What tokenizers write for bytes that are no character, or not yet."""

_CONTEXT = "abcdef"
"""Text before a token that shows what the token itself adds. Source: transformers 5.23, `StopStringCriteria`."""
_KEPT = 24
"""Tokens that are decoded again with each new one: enough for one character between any two invalid bytes."""
_UNLIKE = 3
"""Characters at the beginning that may differ if a text is decoded from its middle: rests of one character."""


class Detokenizer:
    """What a tokenizer makes of token ids.

    Args:
        tokenizer: that was opened by `open_tokenizer`.
        path: its file, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, path: Path) -> None:
        self._tokenizer, self._path = tokenizer, path
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._bytes: dict[int, bytes] = {}
        kinds = _decoder_kinds(tokenizer)
        self._has_fallback = "ByteFallback" in kinds
        self._bytes_of_characters = _byte_alphabet() if "ByteLevel" in kinds and not self._has_fallback else {}

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all tokens together, without special tokens.

        Raises:
            BundleError: the tokenizer fails.
        """
        with refusing_failures(self._path):
            text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def is_left_out(self, token_id: int) -> bool:
        """Whether a token is special, or none of the vocabulary: the text is the same without it."""
        token = self._tokenizer.id_to_token(token_id)
        return token is None or token in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that it does not begin, as bytes in UTF-8; of special tokens too.

        Source: transformers 5.23, `StopStringCriteria.clean_tokenizer_vocab`.

        Raises:
            BundleError: the tokenizer fails.
        """
        content = self._bytes.get(token_id)
        if content is None:
            with refusing_failures(self._path):
                self._bytes[token_id] = content = self._find_bytes(self._tokenizer.id_to_token(token_id))
        return content

    def is_byte(self, token_id: int) -> bool:
        """Whether a token stands for a byte where the vocabulary has no token for a character."""
        return self._has_fallback and _fallback_byte(self._tokenizer.id_to_token(token_id)) is not None

    @property
    def invalid_byte(self) -> int | None:
        """The token of a byte that no character has, if the tokenizer falls back to bytes."""
        token_id: int | None = self._tokenizer.token_to_id("<0xFF>") if self._has_fallback else None
        return token_id

    def _find_bytes(self, token: str | None) -> bytes:
        if token is None:
            return b""
        if self._has_fallback and (byte := _fallback_byte(token)) is not None:
            return bytes([byte])
        if self._bytes_of_characters and all(letter in self._bytes_of_characters for letter in token):
            return bytes(self._bytes_of_characters[letter] for letter in token)
        before: list[str] = self._tokenizer.encode(_CONTEXT, add_special_tokens=False).tokens
        text, plain = self._joined([*before, token]), self._joined(before)
        start = text.find(_CONTEXT)
        return (text.removeprefix(plain) if start < 0 else text[start + len(_CONTEXT) :]).encode()

    def _joined(self, tokens: list[str]) -> str:
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))


class TextWindow:
    """The text of tokens that come one by one, in whole characters; the work for each is the same however many came.

    Bytes that are no character, or not yet, are held back until a character follows them. The text is that of all
    tokens decoded together, with one exception. If a tokenizer falls back to bytes, a byte that fits nowhere undoes the
    characters of the bytes around it. Here, characters that were given out before it came stay.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._ids: list[int] = []  # the last ones
        self._given = 0  # characters of their text
        self._missing = 0  # characters that were held back and belong to earlier tokens: none is a whole one
        self._limit = 2 * _KEPT
        self._unsettled = 0  # tokens in turn that ended in no whole character

    def push(self, token_id: int) -> str:
        """The characters that a token makes certain, possibly none.

        Raises:
            BundleError: the tokenizer fails.
        """
        if self._detokenizer.is_left_out(token_id):
            return ""
        self._ids.append(token_id)
        whole = self._detokenizer.decode(self._ids)
        settled = len(whole.rstrip(NO_CHARACTER))
        self._unsettled = 0 if settled == len(whole) else self._unsettled + 1
        piece = whole[self._given : settled]
        if piece:
            piece, self._missing = NO_CHARACTER * self._missing + piece, 0
            self._given = settled
        # A character has four bytes at most: after four tokens no byte waits for others.
        if len(self._ids) >= self._limit and self._unsettled not in (1, 2, 3):
            self._shorten(whole)
        return piece

    def _shorten(self, whole: str) -> None:
        """Go on with the last tokens alone, if their text continues as that of all of them does."""
        held = len(whole) - self._given
        for kept in self._last_tokens():
            text = self._detokenizer.decode(kept)
            given = max(0, len(text) - held)
            alike = text[min(_UNLIKE, given) :]
            if held >= 0 and len(text) > _UNLIKE and whole.endswith(alike):
                self._missing += max(0, held - len(text))
                self._ids, self._given, self._limit = kept, given, 2 * _KEPT
                return
        self._limit *= 2

    def _last_tokens(self) -> list[list[int]]:
        """What to try: with fallback to bytes it must not begin inside of a character."""
        if self._unsettled and self._detokenizer.is_byte(self._ids[-1]):
            # These bytes are no characters because of an earlier one, for which another stands.
            invalid = self._detokenizer.invalid_byte
            return [] if invalid is None else [[invalid, *self._ids[-_KEPT:]]]
        return [self._ids[-count:] for count in range(_KEPT, _KEPT + 4)]


class SpaceCleanUp:
    """Spaces taken out of a text that grows, as `clean_up_spaces` does with the whole."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that becomes certain with a piece of the original."""
        self._held += piece
        count = _settled(self._held)
        settled, self._held = self._held[:count], self._held[count:]
        return clean_up_spaces(settled)

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return clean_up_spaces(held)


def clean_up_spaces(text: str) -> str:
    """A text without the spaces that stand before English punctuation and contractions.

    Source: transformers 5.23, `PreTrainedTokenizerBase.clean_up_tokenization`.
    """
    for mark in (" .", " ?", " !", " ,"):
        text = text.replace(mark, mark[1:])
    text = text.replace(" ' ", "'")
    for mark in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(mark, mark[1:])
    return text


def _settled(text: str) -> int:
    """Characters at the beginning that are cleaned up alike whatever follows: up to a space that begins no pattern.

    A pattern begins with a space and has at most three characters behind it. `n` and `'` may become one with what
    follows them after another space.
    """
    end = text.rfind(" ")
    if end < 0 or len(text) - end > 3:
        return len(text)
    while end > 0:
        if text[end - 1] == " ":
            end -= 1
        elif text[max(0, end - 2) : end] in (" n", " '"):
            end -= 2
        else:
            break
    return end


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    decoder = tokenizer.decoder
    state: Any = {} if decoder is None else json.loads(decoder.__getstate__())
    return {str(part.get("type")) for part in components(state)}


def _fallback_byte(token: str | None) -> int | None:
    """The byte of a token `<0x0A>`."""
    if token is None or len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Source: openai/gpt-2, `encoder.py`, `bytes_to_unicode`.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
