"""Stop strings, looked for in the bytes of tokens as they come."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_CONTINUATIONS = bytes(range(0x80, 0xC0))


class StopStrings:
    """Looks for stop strings in a text that comes token by token; the work is linear in the text.

    A stop string is met when it ends in the newest token, which may go on behind it. It may begin in the prompt, and
    special tokens count with the text that stands for them. It is compared as bytes: those of a character that several
    tokens make up, and those that make up none.

    Source: transformers 5.23, `StopStringCriteria`.

    Args:
        strings: at least one.
        prompt: the bytes of the prompt's tokens, the last one first; only as many are taken as can matter.

    Attributes:
        cut: characters of the text before the first stop string that was met; None before one is.
        certain: characters of the text, from its beginning, that no stop string can begin in any more.
    """

    def __init__(self, strings: Sequence[str], prompt: Iterable[bytes] = ()) -> None:
        self._searches = [_Search(string.encode()) for string in strings]
        self._longest = max(len(search.wanted) for search in self._searches)
        self._pieces: deque[_Piece] = deque()
        self._end = 0  # bytes so far; those of the prompt lie before 0
        self.cut: int | None = None
        self.certain = 0
        for byte in self._last_bytes(prompt):
            for search in self._searches:
                search.push(byte)

    def _last_bytes(self, prompt: Iterable[bytes]) -> bytes:
        taken: list[bytes] = []
        size = 0
        for token in prompt:
            if size >= self._longest:
                break
            taken.append(token)
            size += len(token)
        return b"".join(reversed(taken))

    def push(self, token: bytes, before: int, after: int) -> None:
        """Take a token.

        Args:
            token: its bytes.
            before: characters that were certain before it came.
            after: characters that are certain now.
        """
        self._pieces.append(_Piece(self._end, token, before, after))
        first: int | None = None
        for byte in token:
            self._end += 1
            for search in self._searches:
                if search.push(byte):
                    start = self._end - len(search.wanted)
                    first = start if first is None else min(first, start)
        if first is not None:
            self.cut = self._characters(first)
            return
        possible = self._end - max(search.matched for search in self._searches)
        self._forget(possible)
        self.certain = after if possible == self._end else self._characters(possible)

    def _forget(self, position: int) -> None:
        """Drop the tokens that end before a position."""
        while self._pieces and self._pieces[0].end <= position:
            self._pieces.popleft()

    def _characters(self, position: int) -> int:
        """Characters of the text before a position in its bytes."""
        for piece in self._pieces:
            if position < piece.end:
                return piece.characters_before(position)
        return self._pieces[-1].after


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

    def __init__(self, wanted: bytes) -> None:
        self.wanted = wanted
        self.matched = 0  # of its first bytes, those that the text ends with
        self._shorter = [0]  # for each beginning, the longest shorter one that it ends with
        for byte in wanted[1:]:
            self._shorter.append(self._next(self._shorter[-1], byte))

    def push(self, byte: int) -> bool:
        """Take a byte; whether the text ends with the string now."""
        if self.matched == len(self.wanted):
            self.matched = self._shorter[-1]
        self.matched = self._next(self.matched, byte)
        return self.matched == len(self.wanted)

    def _next(self, matched: int, byte: int) -> int:
        while matched and self.wanted[matched] != byte:
            matched = self._shorter[matched - 1]
        return matched + (self.wanted[matched] == byte)


def _characters(content: bytes) -> int:
    """Characters that begin and end in some bytes; each invalid sequence is one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return len(decoder.decode(content.lstrip(_CONTINUATIONS)))
