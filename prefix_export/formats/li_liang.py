"""Li and Liang's own checkpoints: GPT-2 (`gpt2/train_control.py`) and BART (`seq2seq/prefixTuning.py`).

| | tensors | site |
|---|---|---|
| GPT-2 | `wte`, `control_trans` | decoder |
| GPT-2, shallow | `control_trans`, flat or [2 * layers, 1, heads, length, head_dim] | decoder |
| BART | `wte`, `control_trans`; `wte2`, `control_trans2`; `wte_enc`, `control_trans_enc` | decoder; cross; encoder |

Text begins at position `prefix_length` in GPT-2 and at 0 in BART, because BART's patched positions do not count the
prefix. The table gives the prefix length, because `lowdata` and shallow variants overrule the config.

Source: XiangLi1999/PrefixTuning at 48dbaff, `get_prompt_p5`, `get_prompt_p2`, `get_prompt_p2_shallow`, and `get_prompt`
of the seq2seq module; Li and Liang, "Prefix-Tuning", ACL 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import BOTH, DECODER, ModelShape
from prefix_runtime import LayerGeometry, LayerPrefix, PrefixMismatchError, Source

from .shared.checkpoint import Checkpoint
from .shared.reparameterised import PromptTable, described, lead, matrix, required_lead, sites_of, untrained
from .shared.trained import SoftPrompt, Trained, check_embedding_size, folded, make_prefix

NAME = "li-liang"
TITLE = "Li & Liang prefix tuning"

TABLES = (
    PromptTable("wte", "control_trans", "decoder"),
    PromptTable("wte2", "control_trans2", "cross"),
    PromptTable("wte_enc", "control_trans_enc", "encoder"),
)
_FLAT, _STACKED = 1, 5


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has `control_trans`, and no tensor that only another family with that name has."""
    others = ("wte_dec.weight", "decoder_wte.weight", "input_tokens", "prefix_tunings.", "M_Prefixes.", "es.")
    names = tuple(checkpoint.shapes)
    if any(name.startswith(other) or f".{other}" in f".{name}" for name in names for other in others):
        return False
    return _shallow_name(checkpoint) is not None or lead(checkpoint, "control_trans.0.weight") is not None


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The tensors of the prefix and their shapes."""
    if _shallow_name(checkpoint) is None:
        required_lead(checkpoint, "control_trans.0.weight")
    tensors = described(checkpoint, lambda name: "control_trans" in name or "wte" in name)
    config = checkpoint.config("config.json") or {}
    settings = {key: str(config[key]) for key in ("preseqlen", "mid_dim", "prefix_dropout") if key in config}
    return {**tensors, **settings}


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`."""
    if (shallow := _shallow_name(checkpoint)) is not None:
        return _read_shallow(checkpoint, shallow, shape)
    start = required_lead(checkpoint, "control_trans.0.weight")
    present = [table for table in TABLES if f"{start}{table.mlp}.0.weight" in checkpoint.shapes]
    _refuse_what_depends_on_text(checkpoint, start, present)
    if _is_soft_prompt(checkpoint, start, shape):
        return _read_soft_prompt(checkpoint, start, shape)
    if (shape.kind == BOTH) != (len(present) > 1):
        expected = "an encoder-decoder" if len(present) > 1 else "a decoder-only model"
        raise PrefixMismatchError(
            f"{checkpoint.weights}: holds prefixes for {', '.join(table.site for table in present)}: expected "
            f"{expected}, found {shape.name!r} ({shape.kind})"
        )
    warnings = _check_length(checkpoint, start) if len(present) > 1 else ()
    sites = sites_of(checkpoint, shape, start, present)
    warnings += tuple(untrained(checkpoint, [f"{start}{table.mlp}" for table in present], "its code"))
    return replace(_trained(checkpoint, sites, moves_positions=shape.kind == DECODER), warnings=warnings)


def _check_length(checkpoint: Checkpoint, start: str) -> tuple[str, ...]:
    """Refuse a table whose number of rows differs from its config: it may hold Control Prefixes' attributes too."""
    config = checkpoint.config("config.json")
    if config is None:
        return ("no config.json is beside it: rows of Control Prefixes' attributes would look like rows of the prefix",)
    rows, length = checkpoint.shapes[f"{start}wte.weight"][:1], config.get("preseqlen")
    if isinstance(length, int) and (length,) != tuple(rows):
        raise CheckpointError(
            f"{checkpoint.weights}: wte.weight: expected {length} rows, the preseqlen of config.json, found "
            f"{', '.join(map(str, rows)) or 'none'}; attributes of Control Prefixes may be among them"
        )
    return ()


def _trained(checkpoint: Checkpoint, sites: Mapping[str, list[LayerPrefix]], *, moves_positions: bool) -> Trained:
    prefix = make_prefix(
        sites,
        moves_positions=moves_positions,
        source=Source(NAME, checkpoint.sha256),
        weights=checkpoint.weights,
    )
    return Trained({"": prefix})


def _shallow_name(checkpoint: Checkpoint) -> str | None:
    """The name of the parameter that is the prefix itself, in a variant without an MLP; None in the others."""
    return next(
        (
            name
            for name, shape in checkpoint.shapes.items()
            if (name == "control_trans" or name.endswith(".control_trans")) and len(shape) in (_FLAT, _STACKED)
        ),
        None,
    )


def _read_shallow(checkpoint: Checkpoint, name: str, shape: ModelShape) -> Trained:
    layers = shape.site("decoder", str(checkpoint.weights))
    numbers, where = checkpoint.array(name), f"{checkpoint.weights}: {name}"
    prefix_layers = _stacked(numbers, layers, where) if numbers.ndim == _STACKED else _flat(numbers, layers, where)
    return _trained(checkpoint, {"decoder": prefix_layers}, moves_positions=True)


def _flat(numbers: np.ndarray, layers: tuple[LayerGeometry, ...], where: str) -> list[LayerPrefix]:
    width = sum(2 * layer.key_value_heads * layer.head_dim for layer in layers)
    if not numbers.size or numbers.size % width:
        raise PrefixMismatchError(f"{where}: expected a multiple of {width} numbers, found {numbers.size}")
    return list(folded(numbers.reshape(-1, width), layers, where))


def _stacked(numbers: np.ndarray, layers: tuple[LayerGeometry, ...], where: str) -> list[LayerPrefix]:
    """The layers of an array [2 * layers, 1, heads, length, head_dim]."""
    first = layers[0]
    expected = (2 * len(layers), 1, first.key_value_heads, numbers.shape[3], first.head_dim)
    if numbers.shape != expected or 0 in numbers.shape:
        raise PrefixMismatchError(f"{where}: expected shape {list(expected)}, found {list(numbers.shape)}")
    slots = numbers[:, 0]
    return [LayerPrefix(slots[2 * index], slots[2 * index + 1]) for index in range(len(layers))]


def _refuse_what_depends_on_text(checkpoint: Checkpoint, start: str, present: list[PromptTable]) -> None:
    names, config = checkpoint.shapes, checkpoint.config("config.json") or {}
    table = names.get(f"{start}wte.weight", ())
    if (
        config.get("optim_prefix") in (False, "no")
        or config.get("use_infix") is True
        or (table[:1] and table[0] == config.get("vocab_size"))
    ):
        raise CheckpointError(
            f"{checkpoint.weights}: expected a trained prefix, found a mode of config.json that computes the prefix "
            "from the text (optim_prefix, use_infix); it has no keys and values of its own"
        )
    if f"{start}wte2.weight" in names and not any(table.site == "cross" for table in present):
        raise CheckpointError(
            f"{checkpoint.weights}: wte2: expected a prefix, found an infix, which the code computes from the text; it "
            "has no keys and values of its own"
        )
    if f"{start}wte.weight" not in names:
        raise CheckpointError(
            f"{checkpoint.weights}: expected embeddings wte.weight before control_trans, found none: a mode that "
            "computes the prefix from the text (optim_prefix no) has no keys and values of its own"
        )


def _is_soft_prompt(checkpoint: Checkpoint, start: str, shape: ModelShape) -> bool:
    """Whether the MLP ends in embeddings (`PrefixEmbTuning`), not in keys and values."""
    last = max(name for name in checkpoint.shapes if name.startswith(f"{start}control_trans.") and "weight" in name)
    return shape.kind == DECODER and checkpoint.shapes[last][:1] == (shape.embedding_size,)


def _read_soft_prompt(checkpoint: Checkpoint, start: str, shape: ModelShape) -> Trained:
    embeddings = matrix(checkpoint, start, TABLES[0])
    check_embedding_size(embeddings.shape, shape, f"{checkpoint.weights}: control_trans")
    warnings = untrained(checkpoint, [f"{start}{TABLES[0].mlp}"], "its code")
    return Trained({"": SoftPrompt(embeddings, Source(f"{NAME}-embedding", checkpoint.sha256))}, tuple(warnings))
