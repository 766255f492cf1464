"""OpenPrompt's `PrefixTuningTemplate`: T5 and GPT-2.

| tensors | site |
|---|---|
| `decoder_wte`, `decoder_control_trans` | decoder of T5, or GPT-2 |
| `wte`, `control_trans` | encoder of T5; in older versions GPT-2 |

There is no prefix for cross-attention. OpenPrompt passes the prefix as transformers' past, so text begins at position
`prefix_length`.

Source: thunlp/OpenPrompt at bd31825 and 38b97b4, `openprompt/prompts/prefix_tuning_template.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import BOTH, DECODER, ModelShape
from prefix_runtime import PrefixMismatchError, Source

from .shared.checkpoint import Checkpoint
from .shared.reparameterised import PromptTable, described, lead, matrix, untrained
from .shared.trained import Trained, folded, make_prefix

NAME = "openprompt"
TITLE = "OpenPrompt prefix tuning"

_DECODER = PromptTable("decoder_wte", "decoder_control_trans", "decoder")
_ENCODER = PromptTable("wte", "control_trans", "encoder")
_OLD = PromptTable("wte", "control_trans", "decoder")


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has OpenPrompt's decoder table, or the token numbers that its template saves."""
    if lead(checkpoint, "wte_dec.weight") is not None:
        return False
    has_tokens = lead(checkpoint, "input_tokens") is not None and lead(checkpoint, "control_trans.0.weight") is not None
    return has_tokens or lead(checkpoint, "decoder_wte.weight") is not None


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The tensors of the prefix and their shapes."""
    _starts(checkpoint)
    return described(
        checkpoint, lambda name: ("control_trans" in name or name.endswith("wte.weight")) and "plm." not in name
    )


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`."""
    starts = _starts(checkpoint)
    if list(starts) == [_ENCODER] and shape.kind == DECODER:
        starts = {_OLD: starts[_ENCODER]}
    if shape.kind != (BOTH if _ENCODER in starts else DECODER) and list(starts) != [_DECODER]:
        raise PrefixMismatchError(
            f"{checkpoint.weights}: holds prefixes for {', '.join(table.site for table in starts)}: expected T5 or "
            f"GPT-2, found {shape.name!r} ({shape.kind})"
        )
    sites = {}
    for table, start in starts.items():
        layers = shape.site(table.site, str(checkpoint.weights))
        sites[table.site] = folded(
            matrix(checkpoint, start, table), layers, f"{checkpoint.weights}: {start}{table.mlp}"
        )
    prefix = make_prefix(
        sites, moves_positions=True, source=Source(NAME, checkpoint.sha256), weights=checkpoint.weights
    )
    stems = [f"{start}{table.mlp}" for table, start in starts.items()]
    return Trained({"": prefix}, tuple(untrained(checkpoint, stems, "OpenPrompt")))


def _starts(checkpoint: Checkpoint) -> dict[PromptTable, str]:
    """The tables that have an MLP, and the text before the MLP's name."""
    starts = {table: lead(checkpoint, f"{table.mlp}.0.weight") for table in (_DECODER, _ENCODER)}
    present = {table: start for table, start in starts.items() if start is not None}
    if not present:
        raise CheckpointError(f"{checkpoint.weights}: expected {_DECODER.mlp}.0, the first layer of an MLP, found none")
    return present
