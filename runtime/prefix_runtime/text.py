"""Text to token ids and back: a tokenizer from its file, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .errors import BundleError, RequestError


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

    def encode(self, text: str) -> list[int]:
        """The text's token ids, with the special tokens that the tokenizer's own post-processor adds.

        Raises:
            RequestError: the text is none: what a terminal makes of bytes that are not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt: expected Unicode text, found {error.object[error.start]!a} at {error.start}"
            ) from error
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def growing_text(self, stop: Sequence[str]) -> GrowingText:
        """A new, empty text that ends before the first of the `stop` strings."""
        return GrowingText(self._tokenizer, stop)


class GrowingText:
    """Text that grows token by token, in whole characters, and ends before a stop string.

    What might turn out to be the beginning of a stop string is held back until it is certain. Special tokens are
    left out. Bytes at the end that are no whole character are left out as well.

    Attributes:
        text: what has been given out so far.
        stopped: whether a stop string was met.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._held = ""

    def push(self, token_id: int) -> str:
        """The characters that a token makes certain, possibly none."""
        self._token_ids.append(token_id)
        self._held += self._stream.step(self._tokenizer, token_id) or ""
        return self._give_certain()

    def _give_certain(self) -> str:
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]
        if found:
            self.stopped = True
            return self._give(min(found), drop_rest=True)
        return self._give(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """The characters that were held back for a stop string, or a character, that did not come."""
        # The last tokens may hold whole characters before the beginning of one: the stream waits for its end.
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=True).rstrip("\ufffd")
        given = self.text + self._held
        if whole.startswith(given):
            self._held += whole[len(given) :]
        return self._give_certain() + self._give(len(self._held))

    def _possible_stop(self) -> int:
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _give(self, count: int, drop_rest: bool = False) -> str:
        given, rest = self._held[:count], self._held[count:]
        self._held = "" if drop_rest else rest
        self.text += given
        return given
