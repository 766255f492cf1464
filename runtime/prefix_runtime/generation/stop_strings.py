"""Stop strings, looked for in the bytes of tokens as they come."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .detokenizer import NO_CHARACTER

_CONTINUATIONS = bytes(range(0x80, 0xC0))


class StopStrings:
    """Looks for stop strings in a text that comes token by token; the work is linear in the text.

    A stop string is met when it ends in the newest token, which may go on behind it. It may begin in the prompt, and
    special tokens count with the text that stands for them. It is compared as bytes: those of a character that several
    tokens make up, and those that make up none. A string with U+FFFD is looked for in the text as well, which has that
    character in place of bytes that are none.

    Source: transformers 5.23, `StopStringCriteria`.

    Args:
        strings: at least one.
        prompt: the bytes of the prompt's tokens, the last one first; only as many are taken as can matter.

    Attributes:
        cut: characters of the text before the first stop string that was met; None before one is.
        certain: characters of the text, from its beginning, that no stop string can begin in any more.
    """

    def __init__(self, strings: Sequence[str], prompt: Iterable[bytes] = ()) -> None:
        self._in_bytes = [_Search(string.encode()) for string in strings]
        self._in_text = [_Search(string) for string in strings if NO_CHARACTER in string]
        self._pieces: deque[_Piece] = deque()
        self._end = 0  # bytes so far; those of the prompt lie before 0
        self.cut: int | None = None
        self.certain = 0
        _first_met(self._in_bytes, _last_bytes(prompt, max(search.size for search in self._in_bytes)))

    def push(self, token: bytes, piece: str, before: int) -> None:
        """Take a token.

        Args:
            token: its bytes.
            piece: the text that became certain with it.
            before: characters of the text before that.
        """
        after = before + len(piece)
        self._pieces.append(_Piece(self._end, token, before, after))
        start, in_text = _first_met(self._in_bytes, token), _first_met(self._in_text, piece)
        cuts = [] if in_text is None else [before + in_text]
        if start is not None:
            cuts.append(self._characters(self._end + start))
        self._end += len(token)
        if cuts:
            self.cut = min(cuts)
            return
        possible = self._end - max(search.matched for search in self._in_bytes)
        in_text = after - max((search.matched for search in self._in_text), default=0)
        self._forget(possible)
        self.certain = min(in_text, after if possible == self._end else self._characters(possible))

    def _forget(self, position: int) -> None:
        """Drop the tokens that end before a position."""
        while self._pieces and self._pieces[0].end <= position:
            self._pieces.popleft()

    def _characters(self, position: int) -> int:
        """Characters of the text before a position in its bytes."""
        return next(piece.characters_before(position) for piece in self._pieces if position < piece.end)


def _last_bytes(prompt: Iterable[bytes], count: int) -> bytes:
    """At least the last `count` bytes of a prompt, if it has as many."""
    taken: list[bytes] = []
    size = 0
    for token in prompt:
        if size >= count:
            break
        taken.append(token)
        size += len(token)
    return b"".join(reversed(taken))


def _first_met(searches: Sequence[_Search], more: Sequence[int | str]) -> int | None:
    """Where the first of the strings that end in some more text begins, counted from there; None if none does."""
    starts = [place + 1 - search.size for search in searches for place, item in enumerate(more) if search.push(item)]
    return min(starts, default=None)


@dataclass(frozen=True)
class _Piece:
    """A token's bytes in the text's, and the characters that were certain before and after it."""

    start: int
    content: bytes
    before: int
    after: int

    @property
    def end(self) -> int:
        return self.start + len(self.content)

    def characters_before(self, position: int) -> int:
        # The token's last characters are the text's: a space at the text's beginning may have been left out, and the
        # first bytes may have completed a character of earlier tokens.
        left_out = _characters(self.content) - (self.after - self.before)
        inside = _characters(self.content[: max(0, position - self.start)])
        return min(max(self.before, self.before + inside - left_out), self.after)


class _Search:
    """The search for one string; Knuth, Morris and Pratt, "Fast Pattern Matching in Strings", 1977."""

    def __init__(self, wanted: bytes | str) -> None:
        self._wanted: Sequence[int | str] = wanted
        self.size = len(wanted)
        self.matched = 0  # of its first bytes or characters, those that the text ends with
        self._shorter = [0]  # for each beginning, the longest shorter one that it ends with
        for item in self._wanted[1:]:
            self._shorter.append(self._next(self._shorter[-1], item))

    def push(self, item: int | str) -> bool:
        """Take a byte or character; whether the text ends with the string now."""
        if self.matched == self.size:
            self.matched = self._shorter[-1]
        self.matched = self._next(self.matched, item)
        return self.matched == self.size

    def _next(self, matched: int, item: int | str) -> int:
        while matched and self._wanted[matched] != item:
            matched = self._shorter[matched - 1]
        return matched + (self._wanted[matched] == item)


def _characters(content: bytes) -> int:
    """Characters that begin and end in some bytes; each invalid sequence is one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return len(decoder.decode(content.lstrip(_CONTINUATIONS)))
