"""Text to token ids and back: what a bundle's tokenizer does, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.errors import BundleError, RequestError

from .detokenizer import Detokenizer, SpaceCleanUp, TextWindow, clean_up_spaces
from .stop_strings import StopStrings
from .tokenizer_file import open_tokenizer, read_settings, refusing_failures

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

_SPLITS = "split_special_tokens"
_CLEANS_UP = "clean_up_tokenization_spaces"
_CLEANS_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


class TextCodec:
    """A Hugging Face tokenizer: its ids and its text are those of transformers' `AutoTokenizer`.

    Of tokenizer_config.json it follows `split_special_tokens` and `clean_up_tokenization_spaces`; everything else that
    changes ids or text stands in tokenizer.json.

    Source: transformers 5.23, `TokenizersBackend`.

    Args:
        path: a `tokenizer.json`.
        config: its `tokenizer_config.json`, if there is one.

    Raises:
        BundleError: a file is not what it should be.
    """

    def __init__(self, path: Path, config: Path | None = None) -> None:
        self._path = path
        self._tokenizer = open_tokenizer(path)
        settings = {} if config is None else read_settings(config)
        for name in (_SPLITS, _CLEANS_UP, _CLEANS_UP_BPE):
            if not isinstance(settings.get(name), bool | None):
                raise BundleError(f"{config}: {name}: expected true or false, found {str(settings[name])[:80]!r}")
        self._tokenizer.encode_special_tokens = bool(settings.get(_SPLITS))
        # It is meant for WordPiece, and would take the spaces of a BPE tokenizer's own text.
        is_bpe = type(self._tokenizer.model).__name__ == "BPE"
        self._cleans_up = bool(settings.get(_CLEANS_UP) and (not is_bpe or settings.get(_CLEANS_UP_BPE)))
        with refusing_failures(path):
            self._detokenizer = Detokenizer(self._tokenizer, path)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> TextCodec | None:
        """A bundle's; None if it has no tokenizer."""
        files = bundle.manifest.files
        if TOKENIZER_NAME not in files:
            return None
        config = bundle.root / TOKENIZER_CONFIG_NAME if TOKENIZER_CONFIG_NAME in files else None
        return cls(bundle.root / TOKENIZER_NAME, config)

    def encode(self, text: str, *, with_special_tokens: bool = True) -> list[int]:
        """The text's token ids, with the special tokens that the tokenizer's own post-processor adds, or without.

        Raises:
            RequestError: the text is none: what a terminal makes of bytes that are not UTF-8.
            BundleError: the tokenizer fails on this text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt: expected Unicode text, found {error.object[error.start]!a} at {error.start}"
            ) from error
        with refusing_failures(self._path):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=with_special_tokens).ids
        return ids

    def token_id(self, token: str) -> int:
        """The id of a token as the vocabulary spells it.

        Raises:
            RequestError: the vocabulary has no such token.
        """
        token_id: int | None = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise RequestError(f"token {token!r}: expected one of the tokenizer's vocabulary, found none of this name")
        return token_id

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special tokens; bytes that are no character become U+FFFD.

        Raises:
            BundleError: the tokenizer fails on these tokens.
        """
        text = self._detokenizer.decode(token_ids)
        return clean_up_spaces(text) if self._cleans_up else text

    def growing_text(self, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> GrowingText:
        """A new, empty text behind the tokens of a prompt. It ends before the first of the `stop` strings."""
        return GrowingText(self._detokenizer, stop, prompt, cleans_up=self._cleans_up)


class GrowingText:
    """Text that grows token by token, in whole characters, and ends before a stop string.

    It is the text that `TextCodec.decode` makes of all tokens together, without bytes at the end that are no whole
    character (see `TextWindow` for the one exception). The work for a token does not depend on how many came before.
    What might turn out to be the beginning of a stop string is held back until it is certain. Special tokens are left
    out, but they count when stop strings are looked for (see `StopStrings`).

    Args:
        detokenizer: of the tokens.
        stop: strings that end the text.
        prompt: tokens before the text: a stop string may begin there.
        cleans_up: take out spaces, see `clean_up_spaces`.

    Attributes:
        stopped: whether a stop string was met.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str], prompt: Sequence[int] = (), *, cleans_up: bool = False
    ) -> None:
        self.stopped = False
        self._detokenizer = detokenizer
        self._window = TextWindow(detokenizer)
        self._stop = StopStrings(stop, map(detokenizer.token_bytes, reversed(prompt))) if stop else None
        self._clean_up = SpaceCleanUp() if cleans_up else None
        self._pieces: list[str] = []
        self._held = ""  # decoded, not given out
        self._given = 0  # characters that were decoded and given out

    @property
    def text(self) -> str:
        """What has been given out so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """The characters that a token makes certain, possibly none.

        Raises:
            BundleError: the tokenizer fails.
        """
        before = self._given + len(self._held)
        piece = self._window.push(token_id)
        self._held += piece
        if self._stop is None:
            return self._give(before + len(piece))
        self._stop.push(self._detokenizer.token_bytes(token_id), piece, before)
        if self._stop.cut is None:
            return self._give(self._stop.certain)
        self.stopped = True
        return self._give(self._stop.cut, is_last=True)

    def finish(self) -> str:
        """The characters that were held back for what did not come."""
        return "" if self.stopped else self._give(self._given + len(self._held), is_last=True)

    def _give(self, count: int, *, is_last: bool = False) -> str:
        """The text up to a number of decoded characters."""
        size = max(0, count - self._given)
        given, self._held = self._held[:size], self._held[size:]
        self._given += len(given)
        if self._clean_up is not None:
            given = self._clean_up.push(given) + (self._clean_up.finish() if is_last else "")
        self._pieces.append(given)
        return given
