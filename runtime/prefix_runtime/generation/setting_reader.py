"""A model's or a request's settings, read one by one and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefix_runtime.checks import is_finite, is_whole
from prefix_runtime.errors import RequestError

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 256
"""Characters of one stop string."""


class SettingReader:
    """A configuration that is read setting by setting, each with its type and range.

    An absent setting, or None, is the default. Every method raises `RequestError`, which begins with the name.

    Args:
        config: names and values as in `generation_config.json`.
        vocab_size: the size of the model's vocabulary.
    """

    def __init__(self, config: Mapping[str, Any], vocab_size: int) -> None:
        self._config, self._vocab_size = config, vocab_size

    def count(self, name: str, default: int | None, least: int = 0, most: float = math.inf) -> int | None:
        """A whole number in a range."""
        value = self._config.get(name)
        if value is None:
            return default
        limits = f"{least} to {most}" if most < math.inf else f"{least} or more"
        _check(name, is_whole(value, least, most), f"a whole number, {limits}", value)
        return int(value)

    def number(self, name: str, default: float, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number in a range."""
        value = self._config.get(name)
        if value is None:
            return default
        limits = "" if least == -math.inf else f", {least:g} " + (f"to {most:g}" if most < math.inf else "or more")
        _check(name, is_finite(value) and least <= value <= most, f"a number{limits}", value)
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false. Default: false."""
        value = self._config.get(name)
        _check(name, value is None or isinstance(value, bool), "true or false", value)
        return bool(value)

    def stopping(self, name: str) -> bool | str:
        """True, false or "never". Default: false."""
        value = self._config.get(name)
        if value == "never" and isinstance(value, str):
            return value
        _check(name, value is None or isinstance(value, bool), 'true, false or "never"', value)
        return bool(value)

    def tokens(self, name: str, most: float = math.inf) -> tuple[int, ...]:
        """A token id, or a list of them. Without a limit, ids beyond the vocabulary match no token."""
        value = self._config.get(name)
        if value is None:
            return ()
        listed = [value] if is_whole(value) else value
        limit = f" up to {most}" if most < math.inf else ""
        _check(name, _is_ids(listed, most), f"a token id or a list of them{limit}", value)
        return tuple(map(int, listed))

    def strings(self, name: str) -> tuple[str, ...]:
        """Strings, one or a list."""
        value = self._config.get(name)
        if value is None:
            return ()
        listed = [value] if isinstance(value, str) else value
        sound = isinstance(listed, list | tuple) and all(isinstance(each, str) and each for each in listed)
        _check(name, sound, "strings of at least one character", value)
        is_bounded = len(listed) <= MAX_STOP_STRINGS and all(len(each) <= MAX_STOP_LENGTH for each in listed)
        _check(name, is_bounded, f"at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters", value)
        return tuple(listed)

    def runs(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Runs of token ids."""
        value = self._config.get(name)
        if value is None:
            return ()
        sound = isinstance(value, list | tuple) and all(self._is_run(each) for each in value)
        _check(name, sound, f"a list of lists of token ids up to {self._vocab_size - 1}", value)
        return tuple(tuple(map(int, run)) for run in value)

    def biases(self, name: str) -> tuple[tuple[tuple[int, ...], float], ...]:
        """Runs of token ids, each with a number."""
        value = self._config.get(name)
        if value is None:
            return ()
        sound = isinstance(value, list | tuple) and all(self._is_bias(each) for each in value)
        expected = f"a list of pairs of token ids up to {self._vocab_size - 1} and a number, as [[[5, 6], -2.0]]"
        _check(name, sound, expected, value)
        return tuple((tuple(map(int, run)), float(bias)) for run, bias in value)

    def decay(self, name: str) -> tuple[int, float] | None:
        """A number of tokens and a factor."""
        value = self._config.get(name)
        if value is None:
            return None
        sound = isinstance(value, list | tuple) and len(value) == 2 and is_whole(value[0]) and is_finite(value[1])
        _check(name, sound and value[1] > 0, "a number of tokens and a factor above 0, as [20, 1.5]", value)
        return int(value[0]), float(value[1])

    def _is_run(self, value: object) -> bool:
        return _is_ids(value, self._vocab_size - 1) and bool(value)

    def _is_bias(self, value: object) -> bool:
        if not isinstance(value, list | tuple) or len(value) != 2:
            return False
        return self._is_run(value[0]) and (is_finite(value[1]) or value[1] == -math.inf)


def _is_ids(value: object, most: float) -> bool:
    return isinstance(value, list | tuple) and all(is_whole(each, 0, most) for each in value)


def _check(name: str, sound: bool, expected: str, value: object) -> None:
    if not sound:
        raise RequestError(f"{name}: expected {expected}, found {short_text(value)}")


def short_text(value: object) -> str:
    """A value as a message shows it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of too many digits
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
