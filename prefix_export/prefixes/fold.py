"""Fold checkpoints, soft prompts and text into prefixes that a model can run with."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import DynamicCache

from prefix_export import formats
from prefix_export.errors import CheckpointError, PrefixExportError
from prefix_export.formats import SoftPrompt
from prefix_export.models import BaseModel, cached, load_config
from prefix_export.models.hub import split_revision
from prefix_export.models.model_shape import DECODER, ModelShape
from prefix_export.prefixes.adapter_tokenizer import tokenizer_warnings_for_bundle
from prefix_runtime import Bundle, LayerPrefix, Prefix, PrefixMismatchError, Source
from prefix_runtime.prefix.geometry import LEAST_TEXT
from prefix_runtime.prefix.prefix import DECODER as SELF_ATTENTION
from prefix_runtime.prefix.prefix import TEXT_HAS_BEGUN

from .lint import lint, lint_prompt

_HUB_PATH = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/([\w][\w.=-]*(?:/[\w][\w.=-]*)*))?")
_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.npy"]


@dataclass(frozen=True)
class Folded:
    """The prefixes of a source, by name (a single one has the empty name), and warnings, one line each."""

    prefixes: Mapping[str, Prefix]
    warnings: tuple[str, ...] = ()


def fetch_checkpoint(path: Path) -> Path:
    """A checkpoint on disk: the path itself, or the folder with the downloaded files of a Hub id.

    A Hub id is `OWNER/NAME`. `OWNER/NAME/FOLDER` names a folder or file in the repository, and `OWNER/NAME@REVISION` a
    branch, tag or commit. Hugging Face's cache and offline variables apply. Only configurations and tensors are
    downloaded.

    Raises:
        CheckpointError: neither the path nor the repository exists, or the Hub cannot be reached.
    """
    name, revision = split_revision(str(path))
    match = _HUB_PATH.fullmatch(name)
    if path.exists() or match is None:
        return path
    repository, inside = match.groups()
    try:
        fetched = Path(snapshot_download(repository, revision=revision, allow_patterns=_patterns(inside)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: expected a trained prefix, a file, a folder or a Hub id, found no such file, and of the Hub: "
            f"{reason}"
        ) from error
    if inside and not (fetched / inside).exists():
        raise CheckpointError(f"{path}: expected {inside} in the repository {repository}, found none there")
    return fetched / inside if inside else fetched


def _patterns(inside: str | None) -> list[str]:
    """The patterns of files to download: configurations and tensors of a repository, or of one folder or file in it."""
    if inside is None:
        return _HUB_FILES
    beside = str(PurePosixPath(inside).parent / "*.json")  # the * of a pattern matches folders too
    return [inside, beside, *(f"{inside}/{pattern}" for pattern in _HUB_FILES)]


def fold(path: Path, shape: ModelShape, load: Callable[[], BaseModel], format_name: str | None = None) -> Folded:
    """The prefixes in a checkpoint, as keys and values.

    Args:
        path: a file, a folder or a Hub id.
        shape: the shape of the base model.
        load: returns the base model. It is called only for a soft prompt of a decoder-only model, which runs through
            the model.
        format_name: see `formats.find_reader`.

    Raises:
        CheckpointError, PrefixError, PrefixMismatchError: see `formats.read`; also if the prefix leaves no room for
            text.
        ModelError: `load` raised it.
    """
    trained = formats.read(fetch_checkpoint(path), shape, format_name)
    prefixes = {name: _as_prefix(part, shape, load, path) for name, part in trained.parts.items()}
    warnings = list(trained.warnings)
    for name, part in trained.parts.items():
        if isinstance(part, SoftPrompt) and shape.kind == DECODER:
            lines = lint_prompt(part.embeddings, _vocabulary(load()))
            warnings += [f"{name}: {line}" if name else line for line in lines]
    limit = shape.context_length
    for prefix in prefixes.values():
        if limit is not None and prefix.position_base > limit - LEAST_TEXT:
            raise PrefixMismatchError(
                f"{path}: expected a prefix that leaves {LEAST_TEXT} of the {limit} positions of {shape.name!r} for "
                f"text, found one of length {prefix.prefix_length}"
            )
    return Folded(prefixes, tuple(warnings))


def _vocabulary(base: BaseModel) -> np.ndarray:
    table: Any = base.model.get_input_embeddings()
    embeddings: np.ndarray = table.weight.detach().float().numpy()
    return embeddings


def fold_for_bundle(path: Path, bundle: Bundle) -> tuple[Prefix, tuple[str, ...]]:
    """The prefix in a checkpoint for a bundle's model, and warnings, one line each. The model itself is not loaded.

    Raises:
        CheckpointError: the checkpoint holds several prefixes, or a soft prompt, which only the model can fold: run
            `prefix-export fold` first. Otherwise as `fold`.
    """
    model = bundle.manifest.model.name
    config = load_config(str(bundle.root))
    shape = ModelShape.of_config(model, config, bundle.manifest.geometry.layers)

    def refuse() -> BaseModel:
        raise CheckpointError(
            f"{path}: expected keys and values, found a soft prompt, which only the model can turn into them; fold it "
            f"first: prefix-export fold {path} --model {model} --output FILE"
        )

    at = fetch_checkpoint(path)
    folded = fold(at, shape, refuse)
    if len(folded.prefixes) > 1:
        raise CheckpointError(
            f"{path}: expected one prefix, found {len(folded.prefixes)}; fold them first: prefix-export fold {path} "
            f"--model {model} --output FOLDER"
        )
    (prefix,) = folded.prefixes.values()
    bundle.manifest.geometry.check_prefix(prefix, str(path))
    warnings = (*folded.warnings, *tokenizer_warnings_for_bundle(at, bundle, config))
    return prefix, (*warnings, *lint(prefix, shape, bundle.manifest.max_length))


def _as_prefix(part: Prefix | SoftPrompt, shape: ModelShape, load: Callable[[], BaseModel], path: Path) -> Prefix:
    if isinstance(part, Prefix):
        return part
    if not np.isfinite(part.embeddings).all():
        raise CheckpointError(f"{path}: soft prompt: expected finite numbers, found others")
    if shape.kind != DECODER:
        # In an encoder, the keys and values of a soft prompt depend on the text behind it.
        return Prefix({}, 0, source=part.source, head=part.head, metadata=part.metadata, embeddings=part.embeddings)
    try:
        prefix = fold_soft_prompt(part.embeddings, load())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return replace(prefix, source=part.source, head=part.head, metadata=part.metadata)


def fold_soft_prompt(embeddings: np.ndarray, base: BaseModel) -> Prefix:
    """The keys and values that a decoder-only model computes for a soft prompt; text begins behind it.

    Args:
        embeddings: [prefix_length, hidden_size].
        base: the model.

    Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, section 2.

    Raises:
        CheckpointError: the prompt leaves no room for text in the model's context.
    """
    inputs = torch.from_numpy(np.array(embeddings, np.float32))[None]
    return _run(base, inputs.shape[1], inputs_embeds=inputs)


def fold_text(text: str, base: BaseModel) -> Prefix:
    """The keys and values of a text, so that the text costs no prefill later.

    The model's tokenizer encodes the text. Special tokens before the text are part of the prefix, special tokens behind
    it are not. The runtime adds none before the prompt that follows.

    Raises:
        PrefixExportError: the model has no tokenizer, or the text has no tokens.
        CheckpointError: the text leaves no room for other text in the model's context.
    """
    if base.tokenizer is None:
        raise PrefixExportError(f"model {base.name!r}: expected a tokenizer to fold a text with, found none")
    ids = _tokens(text, base)
    if not ids:
        raise PrefixExportError("text: expected at least one token, found none")
    prefix = _run(base, len(ids), input_ids=torch.tensor([ids]))
    return replace(prefix, source=Source("text", _hash(ids)), metadata={TEXT_HAS_BEGUN: "true"})


def _tokens(text: str, base: BaseModel) -> list[int]:
    assert base.tokenizer is not None
    token_ids: list[int] = base.tokenizer(text)["input_ids"]
    plain: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    behind = len(token_ids) - len(plain)
    while (
        behind and token_ids and token_ids[-1] in base.tokenizer.all_special_ids and token_ids[-len(plain) :] != plain
    ):
        token_ids, behind = token_ids[:-1], behind - 1
    return token_ids


def _hash(ids: list[int]) -> str:
    return hashlib.sha256(np.array(ids, np.int64).tobytes()).hexdigest()


def _run(base: BaseModel, length: int, **inputs: torch.Tensor) -> Prefix:
    if length > base.geometry.context_length - LEAST_TEXT:
        raise CheckpointError(
            f"expected a soft prompt or text that leaves {LEAST_TEXT} of {base.geometry.context_length} positions, "
            f"found one of {length}"
        )
    cache = DynamicCache()
    with torch.no_grad():
        base.model(
            **inputs,
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            position_ids=torch.arange(length)[None],
            past_key_values=cache,
            use_cache=True,
        )
    layers = tuple(LayerPrefix(key, value) for key, value in cached(cache))
    return Prefix({SELF_ATTENTION: layers}, position_base=length, base_fingerprint=base.fingerprint)
