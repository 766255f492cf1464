"""Held-out texts, which training has not seen: prompts of checks, and texts for comparing quantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefix_export.errors import PrefixExportError
from prefix_runtime import Prefix

if TYPE_CHECKING:
    from prefix_export.models import BaseModel

_MOST_TOKENS = 2048  # of all texts of a task together: a CPU reads them in seconds
_LONGEST = 256
_RANDOM_TEXTS = 8
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Text:
    """Token ids, and the length of their prompt, at least 1; a comparison counts only the tokens behind it."""

    token_ids: tuple[int, ...]
    prompt: int


@dataclass(frozen=True)
class HeldOut:
    """Held-out texts.

    Attributes:
        name: the name of their file.
        texts: the texts.
        is_text: False for random tokens, used without a tokenizer: then perplexity means nothing.
    """

    name: str
    texts: tuple[Text, ...]
    is_text: bool


def read_held_out(path: Path | None, base: BaseModel, prefix: Prefix | None, max_length: int) -> HeldOut:
    """The held-out texts in a file, one per line; without a file, the demo's texts about lighthouses.

    Args:
        path: a text file in UTF-8. A tab in a line separates the prompt from the counted text.
        base: the model; its tokenizer encodes the texts. Without a tokenizer the texts are random tokens.
        prefix: the prefix that the texts will follow; texts are cut to the room that it leaves.
        max_length: maximum number of positions for prefix plus text.

    Raises:
        PrefixExportError: the file is not UTF-8 or too large, the model has no tokenizer for it, or no line has tokens
            that count.
    """
    length = min(_LONGEST, base.geometry.room(prefix, max_length))
    if base.tokenizer is None:
        if path is not None:
            raise PrefixExportError(f"{path}: expected a model with a tokenizer to read text with, found none")
        random = np.random.default_rng(0).integers(base.geometry.vocab_size, size=(_RANDOM_TEXTS, length))
        return HeldOut("random tokens", tuple(Text(tuple(row), 1) for row in random.tolist()), is_text=False)
    encoded = [_encoded(line, base.tokenizer, length) for line in _lines(path)]
    texts = _first_tokens([text for text in encoded if len(text.token_ids) > text.prompt])
    if not texts:
        raise PrefixExportError(
            f"held-out text {path or 'of the demo'}: expected lines of at least two tokens, found none"
        )
    return HeldOut(path.name if path else "the demo's lighthouses", texts, is_text=True)


def _encoded(line: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Text:
    prompt, tab, target = line.partition("\t")
    counted_from = max(1, len(tokenizer.encode(prompt))) if tab else 1
    ids = tokenizer.encode(prompt + target)
    # If the text is too long, cut the beginning of the prompt.
    cut = max(0, len(ids) - length)
    return Text(tuple(ids[cut:]), max(1, counted_from - cut))


def _lines(path: Path | None) -> list[str]:
    source = resources.files(__package__) / "held_out.txt" if path is None else path
    if path is not None and path.stat().st_size > _MOST_BYTES:
        raise PrefixExportError(f"{path}: expected at most {_MOST_BYTES >> 20} MB of text, found more")
    try:
        return [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise PrefixExportError(f"{path}: expected UTF-8 text, found {error}") from error


def _first_tokens(texts: Sequence[Text]) -> tuple[Text, ...]:
    first: list[Text] = []
    for text in texts:
        if first and sum(len(other.token_ids) for other in first) + len(text.token_ids) > _MOST_TOKENS:
            break
        first.append(text)
    return tuple(first)
