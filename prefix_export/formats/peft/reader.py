"""PEFT's prompt-learning adapters: prefix tuning, cartridges, and all kinds that train embeddings before the text's.

Their tensor is `prompt_embeddings`:

| kind | shape |
|---|---|
| `PREFIX_TUNING`, `CARTRIDGE` | [prefix_length, 2 * layers * num_key_value_heads * head_dim] |
| other kinds | [prefix_length, embedding_size] |
| other kinds for an encoder-decoder | [2 * prefix_length, embedding_size]; PEFT never reads the decoder's half |

With `prefix_projection`, PEFT evaluates the MLP when it saves. `MULTITASK_PROMPT_TUNING` also has a low-rank factor for
each task. The module `adapter` finds adapters in a checkpoint.

Source: PEFT 0.21.2, `PeftModel.get_prompt`, `get_prompt_embedding_to_save` and the `forward` of each task's model; text
begins at position `prefix_length` (`_adjust_prompt_learning_kwargs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.formats.shared.checkpoint import Checkpoint
from prefix_export.formats.shared.trained import SoftPrompt, Trained, check_embedding_size, folded, make_prefix
from prefix_export.formats.shared.untrained import DEVIATION, UNTRAINED, is_normal
from prefix_export.models.model_shape import BOTH, ModelShape
from prefix_runtime import LayerGeometry, LayerPrefix, Prefix, PrefixMismatchError
from prefix_runtime.checks import is_whole

from .adapter import CONFIG_NAME, KEYS_AND_VALUES, PROMPTS, Adapter, adapters_of, head_name
from .prompt_encoder import COLUMNS, PROMPT, ROWS, PromptEncoder, has_prompt_encoders

__all__ = ["CONFIG_NAME", "NAME", "TITLE", "Saved", "describe", "matches", "read", "saved"]

NAME = "peft"
TITLE = "PEFT adapter"

_FACTORS = 2000
"""The least number of task factors for a test of whether they were trained; there are few factors."""


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has PEFT's tensor, or PEFT's modules."""
    return PROMPT in checkpoint.shapes or has_prompt_encoders(checkpoint)


@dataclass(frozen=True)
class Saved:
    """An adapter as PEFT's `save_pretrained` writes it.

    Attributes:
        config: the content of `adapter_config.json`.
        tensors: the tensors by PEFT's names.
        task: the number of the task in a multitask prompt, otherwise None.
        where: the adapter's name in messages.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    task: int | None
    where: str


def saved(checkpoint: Checkpoint, part: str) -> Saved | None:
    """One part of a checkpoint as PEFT loads it for a causal language model; None if PEFT cannot load it for one.

    Args:
        checkpoint: a checkpoint for which `matches` is True.
        part: a name of `Trained.parts`.

    Raises:
        CheckpointError: there is no such part, or `read` would raise the same.
    """
    adapter, task = _owner(adapters_of(checkpoint), part)
    if adapter.config_path is None or adapter.config["task_type"] != "CAUSAL_LM":
        return None
    tensors = {name: adapter.tensors.array(name) for name in adapter.tensors.shapes}
    return Saved(adapter.config, tensors, task, adapter.config_where)


def _owner(adapters: Mapping[str, Adapter], part: str) -> tuple[Adapter, int | None]:
    """The adapter of a part, and the part's task in it; None without tasks."""
    for name, adapter in adapters.items():
        if adapter.kind != "MULTITASK_PROMPT_TUNING":
            if part == name:
                return adapter, None
        elif part.rpartition("-")[0] == name:
            return adapter, int(part.rpartition("-")[2])
    raise CheckpointError(f"part {part!r}: expected one of {', '.join(adapters) or 'one adapter'}")


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Facts from the configs and tensors of the adapters."""
    adapters = adapters_of(checkpoint)
    if list(adapters) == [""]:
        return _described(adapters[""])
    return {"adapters": ", ".join(adapters)} | {
        f"{name}: {field}": text for name, adapter in adapters.items() for field, text in _described(adapter).items()
    }


def _described(adapter: Adapter) -> dict[str, str]:
    shapes = adapter.tensors.shapes
    tasks = (
        {"tasks": str((shapes.get(COLUMNS) or ("unknown",))[0])} if adapter.kind == "MULTITASK_PROMPT_TUNING" else {}
    )
    head = ", ".join(sorted(map(head_name, shapes.keys() - PROMPTS)))
    shown = {
        "task_type": "task type",
        "num_virtual_tokens": "prefix length",
        "num_layers": "layers",
        "num_attention_heads": "key/value heads",
        "token_dim": "width of a layer",
        "prefix_projection": "trained behind an MLP",
        "base_model_name_or_path": "base model",
    }
    settings = {title: str(adapter.config[key]) for key, title in shown.items() if adapter.config.get(key) is not None}
    stored = {"stored as": "a state dict with PEFT's modules"} if isinstance(adapter.tensors, PromptEncoder) else {}
    return {
        "kind": adapter.kind,
        "tensor": " x ".join(map(str, shapes[PROMPT])),
        **stored,
        **tasks,
        **settings,
        **({"head": head} if head else {}),
    }


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`; each of several adapters is a part with the adapter's name."""
    parts: dict[str, Prefix | SoftPrompt] = {}
    warnings: list[str] = []
    for name, adapter in adapters_of(checkpoint, shape).items():
        read_one = _read_keys_and_values if adapter.kind in KEYS_AND_VALUES else _read_embeddings
        trained = read_one(adapter, shape)
        parts |= {"-".join(filter(None, (name, part))): prefix for part, prefix in trained.parts.items()}
        lines = (*adapter.warnings, *trained.warnings)
        warnings += [f"{name}: {line}" if name else line for line in lines]
    return Trained(parts, tuple(warnings))


def _read_keys_and_values(adapter: Adapter, shape: ModelShape) -> Trained:
    prompt = adapter.prompt()
    length = adapter.config.get("num_virtual_tokens")
    if length != len(prompt):
        raise CheckpointError(
            f"{adapter.config_where}: num_virtual_tokens: expected {len(prompt)}, as the tensor in "
            f"{adapter.checkpoint.weights.name} has, found {length}"
        )
    is_paired = adapter.config["task_type"] == "SEQ_2_SEQ_LM"
    submodules = adapter.config.get("num_transformer_submodules")
    if submodules not in (None, 2 if is_paired else 1):
        raise CheckpointError(
            f"{adapter.config_where}: num_transformer_submodules: expected {2 if is_paired else 1}, found {submodules}"
        )
    if is_paired != (shape.kind == BOTH):
        raise PrefixMismatchError(
            f"{adapter.config_where}: task_type: expected one for a {shape.kind}, as {shape.name!r} is, found "
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
    adapter: Adapter, prompt: np.ndarray, layers: tuple[LayerGeometry, ...]
) -> tuple[tuple[LayerPrefix, ...], tuple[str, ...]]:
    """A decoder's layers in the adapter of an encoder-decoder, in PEFT's own order.

    PEFT repeats the 2L slots once and gives four to each layer. It replaces the last two, for cross-attention, by an
    empty cache. So decoder layer i has its key in slot 4i mod 2L and its value in the next slot.
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
        f"PEFT reads {2 * count - len(never)} of the {2 * count} trained slots, and so does this reader; it skips "
        f"{', '.join(map(str, never[:8]))}{', …' if len(never) > 8 else ''}; some layers share slots"
    )
    return pairs, (warning,) if never else ()


def _read_embeddings(adapter: Adapter, shape: ModelShape) -> Trained:
    prompt, length = adapter.prompt(), adapter.config.get("num_virtual_tokens")
    count = 2 if shape.kind == BOTH else 1
    if not is_whole(length) or len(prompt) not in (length, count * length):
        raise CheckpointError(
            f"{adapter.config_where}: num_virtual_tokens: expected {len(prompt) // count}, as the tensor in "
            f"{adapter.checkpoint.weights.name} has, found {length!r}"
        )
    check_embedding_size(prompt.shape, shape, adapter.where)
    if adapter.kind == "MULTITASK_PROMPT_TUNING":
        if len(prompt) > length:
            raise CheckpointError(
                f"{adapter.where}: expected a prompt for the encoder alone, found one for the decoder too, which runs "
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
    warnings = (
        [f"the last {unread} rows, for the decoder, are not read, because PEFT never reads them"] if unread else []
    )
    if ROWS in adapter.tensors.shapes and is_normal(adapter.tensors.array(ROWS), DEVIATION, _FACTORS):
        warnings.append(f"{ROWS}: {UNTRAINED.format(framework='PEFT')}")
    return Trained(parts, tuple(warnings))


def _factors(adapter: Adapter, prompt: np.ndarray) -> np.ndarray:
    """The factors of the shared prompt for each task, [tasks, prefix_length, hidden_size]."""
    shapes = adapter.tensors.shapes
    columns, rows = shapes.get(COLUMNS, ()), shapes.get(ROWS, ())
    fits = len(columns) == len(rows) == 3 and columns == (rows[0], len(prompt), rows[1]) and rows[2] == prompt.shape[1]
    if not fits:
        raise CheckpointError(
            f"{adapter.checkpoint.weights}: expected {COLUMNS} [tasks, {len(prompt)}, rank] and {ROWS} [tasks, rank, "
            f"{prompt.shape[1]}], found {list(columns)} and {list(rows)}"
        )
    left, right = (adapter.tensors.array(name).astype(np.float32) for name in (COLUMNS, ROWS))
    factors: np.ndarray = left @ right
    return factors


def _check_config(adapter: Adapter, layers: tuple[LayerGeometry, ...]) -> None:
    """Refuse an adapter for a model of another shape by its config, before its tensor is read."""
    first = layers[0]
    for key, expected, unit in (
        ("num_layers", len(layers), "layers"),
        ("num_attention_heads", first.key_value_heads, "key/value heads"),
        (
            "token_dim",
            first.key_value_heads * first.head_dim,
            f"= {first.key_value_heads} heads x head size {first.head_dim}",
        ),
    ):
        actual = adapter.config.get(key)
        if actual is not None and actual != expected:
            raise PrefixMismatchError(f"{adapter.config_where}: {key}: expected {expected} {unit}, found {actual}")
