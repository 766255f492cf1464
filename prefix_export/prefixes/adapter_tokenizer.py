"""Compare the tokenizer beside an adapter, where transformers' Trainer saves it, with the base model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from prefix_export.errors import PrefixExportError
from prefix_export.models import pretrained
from prefix_export.tokenizers.tokenizer import TOKENIZER_FILES, odd_texts
from prefix_runtime import Bundle, PrefixRuntimeError
from prefix_runtime.generation.text import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from prefix_runtime.generation.tokenizer_file import is_panic, open_tokenizer, read_settings

if TYPE_CHECKING:
    from prefix_export.models import BaseModel
    from prefix_export.prefixes.reference import PrefixSource

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""Special tokens that must agree, without padding, because many training scripts set it."""


def with_adapters_tokenizer(
    base: BaseModel, sources: Mapping[str, PrefixSource | None]
) -> tuple[BaseModel, tuple[str, ...]]:
    """The base model with the tokenizer that its adapters were trained with, and warnings, one line each.

    The adapters' tokenizer replaces the base model's under three conditions: it differs, all adapters with a tokenizer
    agree on it, and each of its tokens has a row in the model's embeddings.

    Args:
        base: the model.
        sources: the checkpoint of each task; None if it is not known.
    """
    tokenizers, warnings = _tokenizers(sources, base.model.config)
    differing = {task: text for task, own in tokenizers.items() if (text := _difference(base.tokenizer, own))}
    if not differing:
        return base, tuple(warnings)
    chosen = tokenizers[next(iter(differing))]
    reason = _reason_against(chosen, tokenizers, base)
    for task, text in differing.items():
        line = f"task {task!r}: the tokenizer beside the adapter differs from the base model's ({text})"
        warnings.append(
            f"{line}; the bundle uses {'the adapter' if reason is None else 'the base model'}'s{reason or ''}"
        )
    return (base if reason else replace(base, tokenizer=chosen)), tuple(warnings)


def tokenizer_warnings_for_bundle(path: Path, bundle: Bundle, config: PreTrainedConfig) -> tuple[str, ...]:
    """A warning if the tokenizer beside an adapter differs from the tokenizer of the bundle that it is added to.

    Args:
        path: the adapter's file or folder.
        bundle: the bundle.
        config: the configuration of the bundle's model.
    """
    if TOKENIZER_NAME not in bundle.manifest.files:
        return ()
    try:
        own = load_tokenizer(_folder(path), config)
        if own is None:
            return ()
        text = _difference(load_tokenizer(bundle.root, config), own)
    except (PrefixExportError, PrefixRuntimeError) as error:
        return (f"the tokenizer beside the adapter cannot be compared with the bundle's: {error}",)
    if text is None:
        return ()
    line = f"the tokenizer beside the adapter differs from the bundle's ({text}); the bundle keeps its own"
    return (f"{line}: build a bundle of this adapter to use the adapter's",)


def load_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, or None if it has none. Code in the folder is never run.

    Args:
        folder: a folder with a tokenizer's files. It does not need a config.json.
        config: the model's configuration, by which transformers chooses some tokenizer classes.

    Raises:
        PrefixExportError: transformers cannot load the tokenizer.
        BundleError: a file is too large, or is not a tokenizer.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    if (folder / TOKENIZER_NAME).exists():
        open_tokenizer(folder / TOKENIZER_NAME)
    if (folder / TOKENIZER_CONFIG_NAME).exists():
        read_settings(folder / TOKENIZER_CONFIG_NAME)
    try:
        return pretrained.tokenizer_in(folder, config)
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PrefixExportError(
            f"{folder}: expected a tokenizer that transformers can load without code of its own, found {reason}"
        ) from error


def _tokenizers(
    sources: Mapping[str, PrefixSource | None], config: PreTrainedConfig
) -> tuple[dict[str, PreTrainedTokenizerBase], list[str]]:
    """The tokenizers beside adapters, one for each folder under its first task, and warnings for unreadable ones."""
    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    warnings: list[str] = []
    folders: dict[Path, str] = {}
    for task, source in sources.items():
        if source is None:
            continue
        folders.setdefault(_folder(source.path), task)
    for folder, task in folders.items():
        try:
            own = load_tokenizer(folder, config)
        except (PrefixExportError, PrefixRuntimeError) as error:
            line = f"task {task!r}: the tokenizer beside the adapter cannot be used, the bundle uses the base model's"
            warnings.append(f"{line}: {error}")
            continue
        if own is not None:
            tokenizers[task] = own
    return tokenizers, warnings


def _folder(path: Path) -> Path:
    """The folder in which the tokenizer of a checkpoint would be."""
    folder = path if path.is_dir() or path.stem != "adapter_model" else path.parent
    # A trainer saves a named adapter in its own folder, and the tokenizer in the parent. A parent with a config.json
    # is a model.
    parent = folder.resolve().parent
    has_name = (folder / "adapter_config.json").is_file() and not (parent / "config.json").exists()
    has_own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return parent if has_name and not has_own else folder


def _reason_against(
    chosen: PreTrainedTokenizerBase, tokenizer: Mapping[str, PreTrainedTokenizerBase], base: BaseModel
) -> str | None:
    """The reason why the bundle cannot use the adapters' tokenizer, and what to do; None if it can."""
    if any(_difference(chosen, other) for other in tokenizer.values()):
        return ", because the adapters' tokenizers differ: build each task by itself to use its own"
    largest, rows = max(chosen.get_vocab().values(), default=0), base.geometry.vocab_size
    if largest >= rows:
        return (
            f", because the adapter's has token ids up to {largest} and the model has {rows} rows of embeddings: build "
            "with the base model that was resized for training"
        )
    return None


def _difference(base: PreTrainedTokenizerBase | None, other: PreTrainedTokenizerBase) -> str | None:
    """The first difference that changes ids or text, in words; None if there is none."""
    if base is None:
        return "the base model has none"
    ours, theirs = base.get_vocab(), other.get_vocab()
    for relation, tokens in (("more", theirs.keys() - ours.keys()), ("fewer", ours.keys() - theirs.keys())):
        if tokens:
            return f"{len(tokens)} token{'s' * (len(tokens) > 1)} {relation}: {_listed(sorted(tokens))}"
    moved = [token for token in ours if ours[token] != theirs[token]]
    if moved:
        return f"token {moved[0]!r} has id {theirs[moved[0]]}, not {ours[moved[0]]}"
    names, own_names = base.special_tokens_map, other.special_tokens_map
    for name in _SPECIAL_TOKENS:
        if names.get(name) != own_names.get(name):
            return f"{name} is {own_names.get(name)!r}, not {names.get(name)!r}"
    return _behaviour(base, other)


def _behaviour(base: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    for text in odd_texts(other):
        ids, own = base(text)["input_ids"], other(text)["input_ids"]
        if ids != own:
            return f"{text[:40]!r} has token ids {_listed(own)}, not {_listed(ids)}"
        if base.decode(ids, skip_special_tokens=True) != other.decode(ids, skip_special_tokens=True):
            return f"token ids {_listed(ids)} stand for another text"
    return None


def _listed(values: list[str] | list[int]) -> str:
    shown = ", ".join(repr(value)[:40] for value in values[:8])
    return f"{shown}, …" if len(values) > 8 else shown
