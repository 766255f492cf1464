"""What callers give to `generate` and `stream`, checked before anything is run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict, cast

import numpy as np

from prefix_runtime.checks import is_unicode, is_whole
from prefix_runtime.errors import RequestError

from .generation_config import GenerationConfig
from .sampling import Sampling
from .setting_reader import MAX_STOP_LENGTH, MAX_STOP_STRINGS

_LISTED = ("max_new_tokens", "sampling", "generation_config")
"""Options that may differ between the prompts of a list."""


class GenerationOptions(TypedDict, total=False):
    """What `generate` and `stream` take by name. For a list of prompts, some may be a list with one for each.

    An option that is absent, or None, means the model's own default, as its `generation_config.json` names it.

    max_new_tokens: new tokens at most, or a list of such. Without it and without a default of the model's: 256, or
        fewer if the context has no room for them.
    sampling: how tokens are chosen, or a list; `Sampling()` is greedy. It replaces all of the model's sampling
        settings, but keeps the model's repetition penalty unless it names one. A model that names none is greedy.
    generation_config: settings on top of the model's, by transformers' names, or a list; None as a value turns a
        setting off. `sampling`, `max_new_tokens`, `end_tokens` and `stop` go before it.
    end_tokens: token ids that end the text, in place of the model's; an empty list for none.
    stop: strings that end the text and are left out of it, in place of the model's; an empty list for none. At most 64,
        of at most 256 characters each. A special token's text is one too, and a string may begin in the prompt.
    ignore_end: go on behind end tokens, up to `max_new_tokens`; for measurements.
    num_beams: beams of a beam search; 1 for none. Each takes a row of key/value buffers. Not with sampling.
    num_return_sequences: texts that a beam search returns, the best first: `GenerationResult.sequences`.
    length_penalty: a beam's score is the sum of its log-probabilities over its length to this power. Above 0 favours
        long texts, below 0 short ones.
    early_stopping: True ends the search as soon as there are `num_beams` texts, False if no beam is likely to get
        better than them, "never" if none can.
    token_logprobs: also return the log-probability of each new token, before any rule changed it.
    """

    max_new_tokens: int | Sequence[int | None] | None
    sampling: Sampling | Sequence[Sampling | None] | None
    stop: str | Sequence[str] | None
    ignore_end: bool
    end_tokens: int | Sequence[int] | None
    generation_config: GenerationConfig | Sequence[GenerationConfig | None] | None
    num_beams: int | None
    num_return_sequences: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    token_logprobs: bool


def as_list(
    prompt: str | list[str] | None, token_ids: Sequence[int] | Sequence[Sequence[int]] | None
) -> tuple[list[Any], bool]:
    """The prompts, and whether a single one was given.

    Raises:
        RequestError: neither or both were given, or something else.
    """
    if (prompt is None) == (token_ids is None):
        raise RequestError("expected either a prompt or token_ids, found " + ("neither" if prompt is None else "both"))
    if prompt is not None:
        if isinstance(prompt, str):
            return [prompt], True
        listed = list(prompt) if isinstance(prompt, Iterable) else [prompt]
        if all(isinstance(item, str) for item in listed):
            return listed, False
        raise RequestError("prompt: expected text or a list of texts; give token ids as token_ids=")
    is_scalar = isinstance(token_ids, np.ndarray) and token_ids.ndim == 0
    if isinstance(token_ids, str | bytes) or not isinstance(token_ids, Iterable) or is_scalar:
        raise RequestError(f"token_ids: expected whole numbers, found {token_ids!r}; give text as the prompt")
    rows: list[Any] = list(token_ids)
    if rows and _is_row(rows[0]):
        for place, row in enumerate(rows):
            if not _is_row(row):
                raise RequestError(
                    f"token_ids[{place}]: expected a list of whole numbers like the others, found {row!r}"
                )
            check_ids(row)
        return rows, False
    check_ids(rows)
    return [rows], True


def _is_row(given: object) -> bool:
    return isinstance(given, Sequence | np.ndarray) and not isinstance(given, str | bytes)


def check_names(options: GenerationOptions) -> None:
    """Refuse options that there are not.

    Raises:
        TypeError: as Python itself does; a misspelt option must not be left out silently.
    """
    unknown = sorted(set(options) - set(GenerationOptions.__annotations__))
    if unknown:
        raise TypeError(f"expected the options {', '.join(GenerationOptions.__annotations__)}, found {unknown}")


def check_ids(row: Any) -> None:
    """Refuse what is no list of whole numbers.

    Raises:
        RequestError: naming the first id that is none, or that there are no ids.
    """
    if not isinstance(row, Sequence | np.ndarray) or (isinstance(row, np.ndarray) and row.ndim == 0):
        raise RequestError(f"token_ids: expected a list of whole numbers, found {row!r}")
    for index, token_id in enumerate(row):
        if not is_whole(token_id, -math.inf):
            raise RequestError(f"token_ids[{index}]: expected a whole number, found {token_id!r}")


def one_each(task: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """The task of each of some prompts.

    Raises:
        RequestError: there are more or fewer of them.
    """
    if task is None or isinstance(task, str):
        return [task] * count
    if not isinstance(task, Sequence) or len(task) != count:
        actual = len(task) if isinstance(task, Sequence) else repr(task)
        raise RequestError(f"task: expected one, or one for each of the {count} prompts, found {actual}")
    return list(task)


def options_of_each(options: GenerationOptions, count: int) -> list[GenerationOptions]:
    """The options of each of some prompts.

    Raises:
        RequestError: a list of them has more or fewer.
    """
    listed = {name: value for name, value in options.items() if name in _LISTED and isinstance(value, list | tuple)}
    for name, values in listed.items():
        if len(values) != count:
            raise RequestError(f"{name}: expected one, or one for each of the {count} prompts, found {len(values)}")
    rows = [{**options, **{name: values[row] for name, values in listed.items()}} for row in range(count)]
    return cast(list[GenerationOptions], rows)


def as_sampling(sampling: object, default: Sampling) -> Sampling:
    """What was given, or the default.

    Raises:
        RequestError: it is something else.
    """
    if sampling is None:
        return default
    if not isinstance(sampling, Sampling):
        raise RequestError(f"sampling: expected a Sampling, found {sampling!r}")
    return sampling


def as_stop(stop: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The strings that were given; None without any option.

    Raises:
        RequestError: one is empty, is too long, or is something else; there are too many.
    """
    if stop is None:
        return None
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) and string for string in strings):
        raise RequestError(f"stop: expected strings of at least one character, found {strings!r}")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop: expected at most {MAX_STOP_STRINGS} strings, found {len(strings)}")
    for place, string in enumerate(strings):
        if len(string) > MAX_STOP_LENGTH:
            raise RequestError(
                f"stop[{place}]: expected at most {MAX_STOP_LENGTH} characters, found {len(string)}: give its beginning"
            )
        if not is_unicode(string):
            raise RequestError(f"stop[{place}]: expected Unicode text, found {string!a}")
    return tuple(strings)


def as_end_tokens(end_tokens: int | Sequence[int] | None, vocab_size: int) -> list[int] | None:
    """The token ids that were given; None without any option.

    Raises:
        RequestError: one is no token of the vocabulary.
    """
    if end_tokens is None:
        return None
    listed: Any = [end_tokens] if is_whole(end_tokens) else end_tokens
    is_list = isinstance(listed, Sequence | set | frozenset | np.ndarray) and not isinstance(listed, str | bytes)
    if not is_list or not all(is_whole(token_id, 0, vocab_size - 1) for token_id in listed):
        raise RequestError(f"end_tokens: expected token ids of 0 to {vocab_size - 1}, found {end_tokens!r}")
    return [int(token_id) for token_id in listed]
