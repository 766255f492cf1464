"""UnifiedSKG's checkpoints: the whole T5 or BART under `pretrain_model`, and a prefix for each attention site.

| tensors | site |
|---|---|
| `wte`, `control_trans` | decoder self-attention |
| `wte_dec`, `control_trans_dec` | cross-attention, despite the name |
| `wte_enc`, `control_trans_enc` | encoder |

Text begins at position 0. T5's relative bias is zero on the prefix; the prefix's metadata records this
(`relative_position_bias`).

Source: xlang-ai/UnifiedSKG at ed6637d, `models/unified/prefixtuning.py`; the bias follows its forks.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import ModelShape
from prefix_runtime import Source

from .shared.checkpoint import Checkpoint
from .shared.reparameterised import PromptTable, described, lead, required_lead, sites_of, untrained
from .shared.trained import Trained, make_prefix

NAME = "unified-skg"
TITLE = "UnifiedSKG prefix tuning"

_TABLES = (
    PromptTable("wte", "control_trans", "decoder"),
    PromptTable("wte_dec", "control_trans_dec", "cross"),
    PromptTable("wte_enc", "control_trans_enc", "encoder"),
)
_DEPENDS_ON_TEXT = {
    "knowledge_trans": "knowledge, which the code computes from the text",
    "multi_prefix.": "prefixes of several tasks, whose combination is not in the checkpoint",
}


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has the table for cross-attention; only UnifiedSKG uses its name."""
    return lead(checkpoint, "wte_dec.weight") is not None


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The tensors of the prefix and their shapes."""
    required_lead(checkpoint, "wte_dec.weight")
    return described(
        checkpoint, lambda name: ("control_trans" in name or "wte" in name) and "pretrain_model." not in name
    )


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`."""
    start = required_lead(checkpoint, "wte_dec.weight")
    for part, content in _DEPENDS_ON_TEXT.items():
        if any(part in name for name in checkpoint.shapes):
            raise CheckpointError(
                f"{checkpoint.weights}: expected a prefix alone, found {content}; it cannot be folded"
            )
    sites = sites_of(checkpoint, shape, start, _TABLES)
    prefix = make_prefix(
        sites,
        moves_positions=False,
        source=Source(NAME, checkpoint.sha256),
        weights=checkpoint.weights,
        metadata={"relative_position_bias": "zero"},
    )
    warning = (
        "a run with descriptions (use_description) computes its prefix from the text, which this file cannot show: use "
        "this prefix only if training ran without descriptions"
    )
    stems = [f"{start}{table.mlp}" for table in _TABLES]
    return Trained({"": prefix}, (warning, *untrained(checkpoint, stems, "its code")))
