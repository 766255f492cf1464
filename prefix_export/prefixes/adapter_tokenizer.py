"""A tokenizer that was saved beside an adapter, as transformers' Trainer does: whether it is the base model's."""

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

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""Special tokens that must agree; padding is left out, because many set it for training alone."""


def with_adapters_tokenizer(
    base: BaseModel, sources: Mapping[str, PrefixSource | None]
) -> tuple[BaseModel, tuple[str, ...]]:
    """The base model with the tokenizer that its adapters were trained with, and what a user should know, a line each.

    It is the adapters' if all that have one agree on it, it differs from the base's, and each of its tokens has a row
    in the model's embeddings. Otherwise it is the base's.

    Args:
        base: the model.
        sources: what each task was folded from.
    """
    tokenizers, warnings = _tokenizers(sources, base.model.config)
    differing = {task: text for task, own in tokenizers.items() if (text := _difference(base.tokenizer, own))}
    if not differing:
        return base, tuple(warnings)
    chosen = tokenizers[next(iter(differing))]
    reason = _reason_against(chosen, tokenizers, base)
    for task, text in differing.items():
        what = f"task {task!r}: the tokenizer beside the adapter differs from the base model's ({text})"
        warnings.append(
            f"{what}; the bundle uses {'the adapter' if reason is None else 'the base model'}'s{reason or ''}"
        )
    return (base if reason else replace(base, tokenizer=chosen)), tuple(warnings)


def tokenizer_warnings_for_bundle(path: Path, bundle: Bundle, config: PreTrainedConfig) -> tuple[str, ...]:
    """What a user should know of the tokenizer beside an adapter that is added to a bundle, a line at most.

    Args:
        path: the adapter's.
        bundle: that it is added to.
        config: of the bundle's model.
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
    """The tokenizer in a folder, or None if it has none. No code of the folder is run.

    Args:
        folder: with a tokenizer's files, and no need of a config.json.
        config: of the model; some of transformers' classes are chosen by it.

    Raises:
        PrefixExportError: transformers cannot load it.
        BundleError: a file is too large, or is no tokenizer.
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
    """The tokenizers beside adapters, one for each folder under its first task, and those that cannot be read."""
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
    """Where the tokenizer of a checkpoint would lie."""
    folder = path if path.is_dir() or path.stem != "adapter_model" else path.parent
    # A trainer saves an adapter that has a name in a folder of its own, the tokenizer beside that folder. A parent with
    # a configuration is a model.
    parent = folder.resolve().parent
    is_named = (folder / "adapter_config.json").is_file() and not (parent / "config.json").exists()
    has_own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return parent if is_named and not has_own else folder


def _reason_against(
    chosen: PreTrainedTokenizerBase, tokenizer: Mapping[str, PreTrainedTokenizerBase], base: BaseModel
) -> str | None:
    """Why an adapters' tokenizer cannot be the bundle's, and what to do; None if it can."""
    if any(_difference(chosen, other) for other in tokenizer.values()):
        return ", because the adapters' tokenizers differ: build each task by itself to use its own"
    largest, rows = max(chosen.get_vocab().values(), default=0), base.geometry.vocab_size
    if largest >= rows:
        return (
            f", because the adapter's has token ids up to {largest} and the model has {rows} rows of embeddings: build "
            "from the base model as it was resized for training"
        )
    return None


def _difference(base: PreTrainedTokenizerBase | None, other: PreTrainedTokenizerBase) -> str | None:
    """The first thing that changes ids or text, in words; None if nothing does."""
    if base is None:
        return "the base model has none"
    ours, theirs = base.get_vocab(), other.get_vocab()
    for what, tokens in (("more", theirs.keys() - ours.keys()), ("fewer", ours.keys() - theirs.keys())):
        if tokens:
            return f"{len(tokens)} token{'s' * (len(tokens) > 1)} {what}: {_listed(sorted(tokens))}"
    moved = [token for token in ours if ours[token] != theirs[token]]
    if moved:
        return f"token {moved[0]!r} has id {theirs[moved[0]]}, not {ours[moved[0]]}"
    names, own_names = base.special_tokens_map, other.special_tokens_map
    for name in _NAMED:
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
