"""OpenPrompt's `PrefixTuningTemplate`: T5 and GPT-2.

`decoder_wte`, `decoder_control_trans` are the decoder's, of GPT-2 too; `wte`, `control_trans` are T5's encoder's.
Before there were two, `wte`, `control_trans` were GPT-2's. There is no prefix for cross-attention. The prefix is the
past that transformers knows: text begins at position `prefix_length`.

Source: thunlp/OpenPrompt at bd31825 and 38b97b4, `openprompt/prompts/prefix_tuning_template.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefix_export.errors import CheckpointError
from prefix_export.shape import BOTH, DECODER, Shape
from prefix_runtime import PrefixMismatchError, Source

from .checkpoint import Checkpoint
from .reparameterised import Table, lead, matrix
from .trained import Trained, folded, make_prefix

NAME = "openprompt"
TITLE = "OpenPrompt prefix tuning"

_DECODER = Table("decoder_wte", "decoder_control_trans", "decoder")
_ENCODER = Table("wte", "control_trans", "encoder")
_OLD = Table("wte", "control_trans", "decoder")


def matches(checkpoint: Checkpoint) -> bool:
    """Whether it has a decoder's table by OpenPrompt's name, or the token numbers that its template saves."""
    if lead(checkpoint, "wte_dec.weight") is not None:
        return False
    has_tokens = lead(checkpoint, "input_tokens") is not None and lead(checkpoint, "control_trans.0.weight") is not None
    return has_tokens or lead(checkpoint, "decoder_wte.weight") is not None


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The tensors of the prefix and their shapes."""
    names = [name for name in checkpoint.shapes if "control_trans" in name or name.endswith("wte.weight")]
    return {name: " x ".join(map(str, checkpoint.shapes[name])) for name in names if "plm." not in name}


def read(checkpoint: Checkpoint, shape: Shape) -> Trained:
    """See `formats.read`."""
    found = {table: lead(checkpoint, f"{table.mlp}.0.weight") for table in (_DECODER, _ENCODER)}
    tables = [table for table, start in found.items() if start is not None]
    if not tables:
        raise CheckpointError(f"{checkpoint.weights}: expected {_DECODER.mlp}.0, the first layer of an MLP, found none")
    if tables == [_ENCODER] and shape.kind == DECODER:
        found, tables = {_OLD: found[_ENCODER]}, [_OLD]
    if shape.kind != (BOTH if _ENCODER in tables else DECODER) and tables != [_DECODER]:
        raise PrefixMismatchError(
            f"{checkpoint.weights}: holds prefixes for {', '.join(table.site for table in tables)}: expected T5 or "
            "GPT-2, "
            f"found {shape.name!r} ({shape.kind})"
        )
    sites = {}
    for table in tables:
        start = found[table]
        if start is None:
            raise CheckpointError(f"{checkpoint.weights}: expected {table.mlp}, found none")
        layers = shape.site(table.site, str(checkpoint.weights))
        sites[table.site] = folded(
            matrix(checkpoint, start, table), layers, f"{checkpoint.weights}: {start}{table.mlp}"
        )
    prefix = make_prefix(
        sites, moves_positions=True, source=Source(NAME, checkpoint.sha256), weights=checkpoint.weights
    )
    return Trained({"": prefix})
