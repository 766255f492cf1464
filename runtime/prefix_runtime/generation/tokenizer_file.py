"""A tokenizer's files: read with bounds, checked before use, and failures inside the library turned into our error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from prefix_runtime.errors import BundleError

MAX_TOKENIZER_BYTES = 128 << 20
"""The largest published tokenizer.json, of 262,000 tokens, takes 34 MB."""
MAX_CONFIG_BYTES = 16 << 20
MAX_ADDED_TOKENS = 1 << 18
"""Speech and image models add tens of thousands."""
MAX_COMPONENTS = 256
"""Normalizers, pre-tokenizers, post-processors or decoders, each kind counted with those inside of sequences."""
MAX_GROWTH = 1024
"""How much longer the components of one kind may make a text. 40 rules "a" to "aa" would fill any memory."""
MAX_PATTERN = 16 << 10
"""Characters of a pattern. Published regular expressions have at most a few hundred."""
MAX_CHARSMAP = 4 << 20
"""Base64 characters of a precompiled character map. SentencePiece's own maps take 320 kB."""
MAX_TEMPLATE_TOKENS = 256
"""Special tokens that are added to a text."""
MAX_WORD = 1000
"""Characters of a word that WordPiece looks up: its time grows with their cube."""

_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")
_NORMALIZER = "normalizer"
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`; it neither truncates nor pads, whatever the file says.

    Raises:
        BundleError: the file is no tokenizer, or is larger or more deeply nested than a tokenizer is.
    """
    content = read_bounded(path, MAX_TOKENIZER_BYTES, "a tokenizer")
    _check_normalizers(content, path)
    try:
        with refusing_failures(path):
            tokenizer: Tokenizer = Tokenizer.from_buffer(content)
            tokenizer.no_truncation()
            tokenizer.no_padding()
    except (ValueError, BundleError) as error:
        reason = error.__cause__ or error
        raise BundleError(f"{path}: expected a tokenizer, found a file that is none: {_one_line(reason)}") from error
    with refusing_failures(path):
        _check_shape(tokenizer, path)
    return tokenizer


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a `tokenizer_config.json`.

    Raises:
        BundleError: the file is no JSON object, or is too large.
    """
    content = read_bounded(path, MAX_CONFIG_BYTES, "a JSON object")
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: expected a JSON object, found text that is none: {_one_line(error)}") from error
    if not isinstance(settings, dict):
        raise BundleError(f"{path}: expected a JSON object, found {type(settings).__name__}")
    return settings


def read_bounded(path: Path, limit: int, what: str) -> bytes:
    """A regular file's bytes.

    Raises:
        BundleError: there is no such file, it is a device or a pipe, it cannot be read, or it is larger than `limit`.
    """
    try:
        if not path.is_file():
            raise BundleError(f"{path}: expected {what}, found {'no regular file' if path.exists() else 'no file'}")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path}: expected {what}, found a file that cannot be read: {error}") from error
    if len(content) > limit:
        raise BundleError(f"{path}: expected {what} of at most {limit >> 20} MiB, found more")
    return content


@contextmanager
def refusing_failures(path: Path) -> Iterator[None]:
    """Turn what the tokenizers library raises into an error that names the file.

    The library raises `Exception` itself, and a Rust panic is a `BaseException` that a server would not catch. Every
    other exception passes.

    Raises:
        BundleError: the library failed.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or is_panic(error):
            raise BundleError(
                f"{path}: expected a tokenizer that works, found one that fails: {_one_line(error)}"
            ) from error
        raise


def is_panic(error: BaseException) -> bool:
    """Whether Rust code panicked. Each library has an exception of its own for that, which cannot be imported."""
    return type(error).__name__ == "PanicException"


def _check_normalizers(content: bytes, path: Path) -> None:
    """Check whatever a file has under the name "normalizer": the library runs it over added tokens as it loads them.

    The rest of the file, of which a vocabulary is the most, is not read.
    """
    try:
        if _ESCAPED_ASCII.search(content):  # no program writes letters so, but the name may hide behind it
            normalizers = _all_values(content, _NORMALIZER)
        else:
            normalizers = _plain_values(content.decode(), _NORMALIZER)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: expected a tokenizer, found a file that is none: {_one_line(error)}") from error
    for state in normalizers:
        _check_components(list(components(state)), f"{path}: {_NORMALIZER}")


def _plain_values(text: str, key: str) -> list[Any]:
    """The JSON values that follow a key, wherever it stands."""
    decoder = json.JSONDecoder()
    return [decoder.raw_decode(text, match.end())[0] for match in re.finditer(rf'"{key}"\s*:\s*', text)]


def _all_values(content: bytes, key: str) -> list[Any]:
    """The same, however the key is written."""
    values: list[Any] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values.extend(value for name, value in pairs if name == key)
        return dict(pairs)

    json.loads(content, object_pairs_hook=note)
    return values


def _check_shape(tokenizer: Tokenizer, path: Path) -> None:
    added = len(tokenizer.get_added_tokens_decoder())
    if added > MAX_ADDED_TOKENS:
        raise BundleError(f"{path}: expected at most {MAX_ADDED_TOKENS} added tokens, found {added}")
    word = getattr(tokenizer.model, "max_input_chars_per_word", 0)
    if word > MAX_WORD:
        raise BundleError(f"{path}: max_input_chars_per_word: expected at most {MAX_WORD}, found {word}")
    for kind in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        part = getattr(tokenizer, kind)
        if part is not None:
            _check_components(list(components(json.loads(part.__getstate__()))), f"{path}: {kind}")
    template = tokenizer.num_special_tokens_to_add(is_pair=False)
    if template > MAX_TEMPLATE_TOKENS:
        raise BundleError(
            f"{path}: post_processor: expected at most {MAX_TEMPLATE_TOKENS} special tokens to add, found {template}"
        )


def components(state: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer, post-processor or decoder, or those that a sequence of them is made of."""
    if not isinstance(state, dict):
        return
    inner = next((state[name] for name in _SEQUENCES if isinstance(state.get(name), list)), None)
    if inner is None:
        yield state
        return
    for part in inner:
        yield from components(part)


def _check_components(parts: list[dict[str, Any]], where: str) -> None:
    if len(parts) > MAX_COMPONENTS:
        raise BundleError(f"{where}: expected at most {MAX_COMPONENTS} components, found {len(parts)}")
    growth = 1.0
    for part in parts:
        if len(_pattern(part)) > MAX_PATTERN:
            raise BundleError(f"{where}: expected a pattern of at most {MAX_PATTERN} characters, found a longer one")
        if len(str(part.get("precompiled_charsmap", ""))) > MAX_CHARSMAP:
            raise BundleError(f"{where}: expected a character map of at most {MAX_CHARSMAP >> 20} MiB, found a larger")
        growth *= _growth(part)
        if growth > MAX_GROWTH:
            raise BundleError(f"{where}: expected text to grow at most {MAX_GROWTH} times, found rules that do more")


def _pattern(part: dict[str, Any]) -> str:
    pattern = part.get("pattern")
    if isinstance(pattern, dict):
        return str(next(iter(pattern.values()), ""))
    return str(pattern or "")


def _growth(part: dict[str, Any]) -> float:
    """How much longer a component can make a text, at most."""
    if part.get("type") == "ByteLevel":
        return 2  # bytes become characters of two bytes
    if "precompiled_charsmap" in part:
        return 20  # U+FDFA has 18 characters in NFKC
    if "prepend" in part:
        return max(1, len(str(part["prepend"])))
    if "pattern" in part and "content" in part:
        is_text = isinstance(part["pattern"], dict) and "String" in part["pattern"]
        return max(1.0, len(str(part["content"])) / max(1, len(_pattern(part)) if is_text else 1))
    if isinstance(part.get("single"), list):
        return max(1, sum("Sequence" in piece for piece in part["single"]))
    return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
