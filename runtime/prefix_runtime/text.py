"""Text to token ids and back: a tokenizer from its file, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from .bundle import Bundle
from .errors import BundleError, RequestError

_NO_CHARACTER = "\ufffd"
"""What tokenizers write for bytes that are no character, or not yet."""


class TextCodec:
    """A Hugging Face `tokenizer.json`.

    Raises:
        BundleError: the file is not one.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises Exception itself.
            raise BundleError(f"{path}: expected a tokenizer, found a file that is none: {error}") from error
        # A prompt is taken whole, whatever the tokenizer was last used for.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> TextCodec | None:
        """A bundle's; None where it has no tokenizer."""
        name = "tokenizer.json"
        return cls(bundle.root / name) if name in bundle.manifest.files else None

    def encode(self, text: str, *, with_special_tokens: bool = True) -> list[int]:
        """The text's token ids, with the special tokens that the tokenizer's own post-processor adds, or without.

        Raises:
            RequestError: the text is none: what a terminal makes of bytes that are not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt: expected Unicode text, found {error.object[error.start]!a} at {error.start}"
            ) from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=with_special_tokens).ids
        return ids

    def token_id(self, token: str) -> int:
        """The id of a token as the vocabulary spells it.

        Raises:
            RequestError: the vocabulary has no such token.
        """
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise RequestError(f"token {token!r}: expected one of the tokenizer's vocabulary, found none of this name")
        return found

    def growing_text(self, stop: Sequence[str]) -> GrowingText:
        """A new, empty text that ends before the first of the `stop` strings."""
        return GrowingText(self._tokenizer, stop)


class GrowingText:
    """Text that grows token by token, in whole characters, and ends before a stop string.

    What might turn out to be the beginning of a stop string is held back until it is certain. Special tokens are
    left out. Bytes at the end that are no whole character are left out as well. Otherwise the text of
    tokens that make up characters is what the tokenizer makes of all of them together.

    Attributes:
        text: what has been given out so far.
        stopped: whether a stop string was met.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._held = ""

    def push(self, token_id: int) -> str:
        """The characters that a token makes certain, possibly none."""
        self._token_ids.append(token_id)
        # All tokens each time: tokenizers' DecodeStream (0.23) is faster, but raises on bytes that are no characters
        # where a tokenizer falls back to bytes, which any model may write.
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=True).rstrip(_NO_CHARACTER)
        # Where a tokenizer falls back to bytes, a byte that fits nowhere undoes the characters of the bytes before it,
        # each byte becoming one: what has been given out stays, and the text goes on behind it.
        self._held = whole[len(self.text) :]
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]
        if found:
            self.stopped = True
            return self._give(min(found))
        return self._give(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """The characters that were held back for a stop string that did not come."""
        return "" if self.stopped else self._give(len(self._held))

    def _possible_stop(self) -> int:
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given
