"""A model's tokenizer: write it into a bundle, and compare it with the runtime's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefix_export.errors import ExportError
from prefix_runtime.generation.text import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, TextCodec
from prefix_runtime.generation.tokenizer_file import is_panic
from prefix_runtime.os_errors import os_error_behind

TOKENIZER_FILES = (
    TOKENIZER_NAME,
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
"""A folder with a tokenizer has at least one of these files."""

ODD_TEXTS = (
    "",
    " ",
    "Hello, world!",
    " leading, trailing ",
    "two  spaces, three   spaces\tand a tab",
    "lines\nand\r\nlines\n\n\nand more\n",
    "don't won ' t he 's I 'm we 've they 're . , ! ?",
    "UPPER lower MiXeD ÀÉÎ straße İ ǅ",
    "0123456789 1,234.5 ١٢٣ ½ ²",
    "def f(x):\n    return x[0] != '\\n'  # code",
    "cafe\u0301 n\u0303 e\u0301\u0301 \u1100\u1161\u11a8",
    "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇫🇷 ❤\ufe0f",
    "日本語と中文、한국어",
    "שלום \u202bعربي\u202c ﷽",
    "zero\u200bwidth \ufeff non\u00a0breaking \u2028 soft\u00ad",
    "nul \x00 del \x7f bell \x07",
    "\ufffd \ufb01 Ⅳ \u210c \uff41\uff42\uff43",
    "▁ Ġ Ċ ## <0x41> </w>",
    "a" * 300,
)
"""Texts that tokenizers treat differently."""

_ADVICE = "encode with transformers, pass token_ids, and decode the new tokens with transformers"
_MOST_SPECIAL = 32
"""Maximum number of added tokens that the odd texts contain."""


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files for transformers, transformers.js and the runtime.

    A tokenizer that runs in Python has no tokenizer.json; see `tokenizer_warnings`.

    Raises:
        ExportError: transformers cannot write the tokenizer.
        OSError: the disk is full or not writable.
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises plain Exception, with the number of an OSError in its text
        if (cause := os_error_behind(error)) is not None:
            raise OSError(cause, os.strerror(cause), str(folder)) from error
        raise ExportError(f"{folder}: the tokenizer cannot be written: {_line(error)}") from error
    path = folder / TOKENIZER_CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("auto_map", None)  # the code that it names is not written
    # transformers writes these only if they were passed when the tokenizer was loaded.
    config["split_special_tokens"] = bool(tokenizer.split_special_tokens)
    config["clean_up_tokenization_spaces"] = bool(tokenizer.clean_up_tokenization_spaces)
    if config.get("tokenizer_class") == "TokenizersBackend":
        # transformers 4, transformers.js and transformers 5 all know this name of the class.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Without this, transformers 4 would also pass token types to the model.
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tokenizer_warnings(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    """Warnings where the runtime's tokenizer differs from transformers', one line each; odd texts are compared.

    Args:
        folder: the folder that `save_tokenizer` wrote to.
        tokenizer: transformers' tokenizer, or None.

    Raises:
        BundleError: the runtime cannot open the tokenizer.
    """
    if tokenizer is None:
        return ()
    kind = type(tokenizer).__name__
    if not (folder / TOKENIZER_NAME).is_file():
        line = f"the tokenizer is transformers' {kind}, which runs in Python and has no {TOKENIZER_NAME}"
        return (f"{line}: the bundle takes token ids, not text; {_ADVICE}",)
    warnings = []
    if code := _code(tokenizer):
        line = f"the tokenizer has code of its own ({code}), which is never run"
        warnings.append(f"{line}: its token ids and text may differ")
    difference = next(_differences(TextCodec(folder / TOKENIZER_NAME, folder / TOKENIZER_CONFIG_NAME), tokenizer), None)
    if difference is not None:
        warnings.append(f"the runtime's tokenizer differs from transformers' {kind}: {difference}; {_ADVICE}")
    return tuple(warnings)


def _code(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The custom class in a tokenizer's configuration, or None."""
    classes = tokenizer.init_kwargs.get("auto_map")
    listed = classes.get("AutoTokenizer") if isinstance(classes, dict) else classes
    return next((str(name) for name in reversed(listed or ()) if name), None)


def _differences(codec: TextCodec, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Odd texts that the two tokenizers encode differently, and token ids that they decode differently."""
    for text, special in product(odd_texts(tokenizer), (True, False)):
        ids = _attempt(_encoded, tokenizer, text, special)
        own_ids = _attempt(codec.encode, text, with_special_tokens=special)
        if own_ids != ids:
            yield f"{_short(text)} has token ids {_short(own_ids)}, not {_short(ids)}"
        elif ids is not None:
            decoded = _attempt(tokenizer.decode, ids, skip_special_tokens=True)
            own_text = _attempt(codec.decode, ids)
            if own_text != decoded:
                yield f"token ids {_short(ids)} are {_short(own_text)}, not {_short(decoded)}"


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def _attempt(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a call, or None if the tokenizer fails: both tokenizers may fail on the same text."""
    try:
        return call(*arguments, **options)
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        return None


def odd_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts of many kinds, and texts with the special tokens and added tokens of a tokenizer."""
    yield from ODD_TEXTS
    for token in list(tokenizer.get_added_vocab())[:_MOST_SPECIAL]:
        yield from (token, f"a {token} b", f"a{token}b", f"{token}{token}\n{token} x")


def _short(shown: object) -> str:
    text = repr(shown)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
