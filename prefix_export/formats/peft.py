"""PEFT's prompt-learning adapters: prefix tuning, cartridges, and everything that trains embeddings before the text's.

A folder or file with one tensor `prompt_embeddings`, `adapter_config.json` beside it. For `PREFIX_TUNING` and
`CARTRIDGE` it is [prefix_length, 2 * layers * num_key_value_heads * head_dim]; with `prefix_projection` the MLP was
evaluated when PEFT saved. For the others it is [prefix_length, hidden_size] (and as much again for the decoder of an
encoder-decoder, which PEFT never reads). `MULTITASK_PROMPT_TUNING` has a low-rank factor for each task beside it.

Source: PEFT 0.21.2, `PeftModel.get_prompt`, `get_prompt_embedding_to_save` and the `forward` of each task's model; text
begins at position `prefix_length` (`_adjust_prompt_learning_kwargs`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.shape import BOTH, Shape
from prefix_runtime import LayerGeometry, LayerPrefix, PrefixMismatchError, Source
from prefix_runtime.checks import is_whole

from .checkpoint import Checkpoint
from .initial import DEVIATION, UNTRAINED, is_normal
from .trained import SoftPrompt, Trained, check_hidden_size, folded, make_prefix

NAME = "peft"
TITLE = "PEFT adapter"

CONFIG_NAME = "adapter_config.json"
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
EMBEDDINGS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
_TENSOR = "prompt_embeddings"
_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_FACTORS = 2000
"""Numbers of the tasks' factors, which are few, that have to be there to tell whether they were trained."""
_EMBEDDING_NAMES = ("wte.", "wpe.", "embed_", "embeddings.", "lm_head.", "embed_tokens.")
_TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class _Adapter:
    """An adapter's tensors and what its config says."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.config["peft_type"])

    @property
    def where(self) -> str:
        return f"{self.checkpoint.weights}: {_TENSOR}"

    @property
    def config_path(self) -> Path:
        return self.checkpoint.config_path(CONFIG_NAME)

    @property
    def source(self) -> Source:
        return Source(f"peft-{self.kind.lower().replace('_', '-')}", self.checkpoint.sha256)

    def prompt(self) -> np.ndarray:
        """The trained tensor, its shape checked."""
        shape = self.checkpoint.shapes[_TENSOR]
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{self.where}: expected shape [prefix_length, width], none 0, found {list(shape)}")
        return self.checkpoint.array(_TENSOR)

    def head(self) -> dict[str, np.ndarray]:
        """The task's own head, by its names in the base model."""
        names = [name for name in self.checkpoint.shapes if name not in (_TENSOR, _COLUMNS, _ROWS)]
        if embeddings := [name for name in names if any(part in name for part in _EMBEDDING_NAMES)]:
            raise CheckpointError(
                f"{self.checkpoint.weights}: expected a prefix and a head at the most, found embeddings of the model, "
                f"{embeddings[0]}, which were trained or saved too; a prefix cannot carry them"
            )
        return {_head_name(name): self.checkpoint.array(name) for name in names}

    def metadata(self) -> dict[str, str]:
        base = self.config.get("base_model_name_or_path")
        found = {"task_type": str(self.config["task_type"])} if self.config.get("task_type") != "CAUSAL_LM" else {}
        if isinstance(base, str) and _HUB_ID.fullmatch(base):
            found["base_model"] = base
        elif isinstance(base, str) and (folder := PureWindowsPath(base).name.strip(".")):
            # Where a folder lay on the machine that it was trained on says nothing elsewhere, and is nobody's business.
            found["base_folder"] = folder
        return found


def matches(checkpoint: Checkpoint) -> bool:
    """Whether it has PEFT's tensor."""
    return _TENSOR in checkpoint.shapes


def is_causal(checkpoint: Checkpoint) -> bool:
    """Whether PEFT would load it for a causal language model."""
    return bool(_open(checkpoint).config["task_type"] == "CAUSAL_LM")


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """What the adapter's config and tensors say."""
    adapter = _open(checkpoint)
    prompt = checkpoint.shapes[_TENSOR]
    tasks = (
        {"tasks": str((checkpoint.shapes.get(_COLUMNS) or ("unknown",))[0])}
        if adapter.kind == "MULTITASK_PROMPT_TUNING"
        else {}
    )
    head = ", ".join(sorted(map(_head_name, checkpoint.shapes.keys() - {_TENSOR, _COLUMNS, _ROWS})))
    shown = {
        "task_type": "task type",
        "num_virtual_tokens": "prefix length",
        "num_layers": "layers",
        "num_attention_heads": "key/value heads",
        "token_dim": "width of a layer",
        "prefix_projection": "trained behind an MLP",
        "base_model_name_or_path": "base model",
    }
    said = {title: str(adapter.config[key]) for key, title in shown.items() if adapter.config.get(key) is not None}
    return {
        "kind": adapter.kind,
        "tensor": " x ".join(map(str, prompt)),
        **tasks,
        **said,
        **({"head": head} if head else {}),
    }


def read(checkpoint: Checkpoint, shape: Shape) -> Trained:
    """See `formats.read`."""
    adapter = _open(checkpoint)
    if adapter.kind in KEYS_AND_VALUES:
        return _read_keys_and_values(adapter, shape)
    return _read_embeddings(adapter, shape)


def _open(checkpoint: Checkpoint) -> _Adapter:
    if not matches(checkpoint):
        there = ", ".join(repr(name) for name in list(checkpoint.shapes)[:4]) or "none"
        raise CheckpointError(f"{checkpoint.weights}: expected PEFT's tensor {_TENSOR!r}, found tensors {there}")
    config = checkpoint.config(CONFIG_NAME)
    if config is None:
        raise CheckpointError(
            f"{checkpoint.weights}: expected {CONFIG_NAME} beside a PEFT adapter, found none; copy both files, or the "
            "adapter's folder"
        )
    adapter = _Adapter(checkpoint, config)
    if config.get("peft_type") in KEYS_AND_VALUES + EMBEDDINGS and config.get("task_type") is None:
        raise CheckpointError(
            f"{adapter.config_path}: task_type: expected one of {', '.join(_TASK_TYPES)}, found none: PEFT's "
            "get_peft_model makes no such adapter, and its plain PeftModel answers as if there were no prefix; if code "
            "of its own trained it, write the task type that it was trained for"
        )
    for key, expected in (("peft_type", KEYS_AND_VALUES + EMBEDDINGS), ("task_type", _TASK_TYPES)):
        if config.get(key) not in expected:
            raise CheckpointError(
                f"{adapter.config_path}: {key}: expected one of {', '.join(expected)}, found {config.get(key)!r}"
            )
    return adapter


def _read_keys_and_values(adapter: _Adapter, shape: Shape) -> Trained:
    prompt = adapter.prompt()
    said = adapter.config.get("num_virtual_tokens")
    if said != len(prompt):
        raise CheckpointError(
            f"{adapter.config_path}: num_virtual_tokens: expected {len(prompt)}, as the tensor in "
            f"{adapter.checkpoint.weights.name} has, found {said}"
        )
    is_paired = adapter.config["task_type"] == "SEQ_2_SEQ_LM"
    submodules = adapter.config.get("num_transformer_submodules")
    if submodules not in (None, 2 if is_paired else 1):
        raise CheckpointError(
            f"{adapter.config_path}: num_transformer_submodules: expected {2 if is_paired else 1}, found {submodules}"
        )
    if is_paired != (shape.kind == BOTH):
        raise PrefixMismatchError(
            f"{adapter.config_path}: task_type: expected one for a {shape.kind}, as {shape.name!r} is, found "
            f"{adapter.config['task_type']}"
        )
    warnings: tuple[str, ...] = ()
    if is_paired:
        site = "decoder"
        layers, warnings = _paired_layers(adapter, prompt, shape.site("decoder", adapter.where))
    else:
        (site,) = shape.sites
        _check_config(adapter, shape.sites[site])
        layers = folded(prompt, shape.sites[site], adapter.where)
    prefix = make_prefix(
        {site: layers},
        moves_positions=True,
        source=adapter.source,
        weights=adapter.checkpoint.weights,
        head=adapter.head(),
        metadata=adapter.metadata(),
    )
    return Trained({"": prefix}, warnings)


def _paired_layers(
    adapter: _Adapter, prompt: np.ndarray, layers: tuple[LayerGeometry, ...]
) -> tuple[tuple[LayerPrefix, ...], tuple[str, ...]]:
    """A decoder's layers in an encoder-decoder's adapter, by PEFT's own map.

    PEFT doubles its 2L slots and takes four for each layer, of which the last two, meant for cross-attention, are
    replaced by an empty cache: decoder layer i has the key of slot 4i mod 2L and the value of the next.
    """
    first = layers[0]
    width = first.key_value_heads * first.head_dim
    if prompt.shape[1] % (2 * width):
        raise PrefixMismatchError(
            f"{adapter.where}: expected a width that is a multiple of {2 * width} = 2 x {first.key_value_heads} heads "
            f"x head size {first.head_dim}, found {prompt.shape[1]}"
        )
    slots = prompt.reshape(len(prompt), -1, first.key_value_heads, first.head_dim).transpose(1, 2, 0, 3)
    count = len(slots) // 2
    if len(layers) > count:
        raise PrefixMismatchError(
            f"{adapter.where}: expected slots for at least {len(layers)} layers, as the decoder has, found them for "
            f"{count}; PEFT itself cannot run such a model"
        )
    used = [(4 * index % (2 * count), (4 * index + 1) % (2 * count)) for index in range(len(layers))]
    pairs = tuple(
        LayerPrefix(np.ascontiguousarray(slots[key]), np.ascontiguousarray(slots[value])) for key, value in used
    )
    never = sorted(set(range(2 * count)) - {slot for pair in used for slot in pair})
    warning = (
        f"of the {2 * count} trained slots PEFT reads {2 * count - len(never)}, so this does too: never read are "
        f"{', '.join(map(str, never[:8]))}{', …' if len(never) > 8 else ''}; some layers share theirs"
    )
    return pairs, (warning,) if never else ()


def _read_embeddings(adapter: _Adapter, shape: Shape) -> Trained:
    prompt, length = adapter.prompt(), adapter.config.get("num_virtual_tokens")
    count = 2 if shape.kind == BOTH else 1
    if not is_whole(length) or len(prompt) not in (length, count * length):
        raise CheckpointError(
            f"{adapter.config_path}: num_virtual_tokens: expected {len(prompt) // count}, as the tensor in "
            f"{adapter.checkpoint.weights.name} has, found {length!r}"
        )
    check_hidden_size(prompt.shape, shape, adapter.where)
    if adapter.kind == "MULTITASK_PROMPT_TUNING":
        if len(prompt) > length:
            raise CheckpointError(
                f"{adapter.where}: expected a prompt of the encoder alone, found one of the decoder too, which goes "
                "through the decoder with the text and has no keys and values of its own; it cannot be folded"
            )
        prompts = {
            str(task): prompt.astype(np.float32) * factor for task, factor in enumerate(_factors(adapter, prompt))
        }
    else:
        prompts = {"": prompt[:length]}
    unread = len(prompt) - length
    parts = {
        name: SoftPrompt(each, adapter.source, adapter.head(), adapter.metadata()) for name, each in prompts.items()
    }
    warnings = [f"the last {unread} rows, meant for the decoder, are read neither by PEFT nor here"] if unread else []
    if _ROWS in adapter.checkpoint.shapes and is_normal(adapter.checkpoint.array(_ROWS), DEVIATION, _FACTORS):
        warnings.append(f"{_ROWS}: {UNTRAINED.format(framework='PEFT')}")
    return Trained(parts, tuple(warnings))


def _factors(adapter: _Adapter, prompt: np.ndarray) -> np.ndarray:
    """What each task multiplies the shared prompt by, [tasks, prefix_length, hidden_size]."""
    shapes = adapter.checkpoint.shapes
    columns, rows = shapes.get(_COLUMNS, ()), shapes.get(_ROWS, ())
    fits = len(columns) == len(rows) == 3 and columns == (rows[0], len(prompt), rows[1]) and rows[2] == prompt.shape[1]
    if not fits:
        raise CheckpointError(
            f"{adapter.checkpoint.weights}: expected {_COLUMNS} [tasks, {len(prompt)}, rank] and {_ROWS} [tasks, rank, "
            f"{prompt.shape[1]}], found {list(columns)} and {list(rows)}"
        )
    left, right = (adapter.checkpoint.array(name).astype(np.float32) for name in (_COLUMNS, _ROWS))
    factors: np.ndarray = left @ right
    return factors


def _check_config(adapter: _Adapter, layers: tuple[LayerGeometry, ...]) -> None:
    """Refuse an adapter for another shape of model by what its config says, before its tensor is looked at."""
    first = layers[0]
    for key, expected, what in (
        ("num_layers", len(layers), "layers"),
        ("num_attention_heads", first.key_value_heads, "key/value heads"),
        (
            "token_dim",
            first.key_value_heads * first.head_dim,
            f"= {first.key_value_heads} heads x head size {first.head_dim}",
        ),
    ):
        said = adapter.config.get(key)
        if said is not None and said != expected:
            raise PrefixMismatchError(f"{adapter.config_path}: {key}: expected {expected} {what}, found {said}")


def _head_name(name: str) -> str:
    for start in ("base_model.model.", "base_model."):
        if name.startswith(start):
            return name.removeprefix(start)
    return name
