"""Names, axes and shapes of a graph's inputs and outputs: what exporter, backends and other clients agree on.

| input | shape | |
|---|---|---|
| `input_ids` | `[batch_size, sequence_length]` int64 | |
| `attention_mask` | `[batch_size, total_sequence_length]` int64 | past and new tokens |
| `position_ids` | `[batch_size, sequence_length]` int64 | explicit, so that a prefix may or may not move positions |
| `past_key_values.{i}.key`, `.value` | `[batch_size, num_key_value_heads, past_sequence_length, head_dim]` | |
| `num_logits_to_keep` | scalar int64 | 0 keeps all, n the last n |

Outputs: `logits` `[batch_size, logits_length, vocab]` float32; `present.{i}.key`, `.value`. In the fast flavour they
are shaped like the past, whose buffers they share: the operator appends in place. In the portable flavour, of standard
operators, they are past and new tokens, and `num_logits_to_keep` may be left out. A graph that holds prefixes speaks of
the client's own tokens alone, in past, mask and positions; with several it has an input `task_id` `[batch_size]` int64.
So does a graph that takes a prefix as inputs of its own, which may be left out, as its past may be: onnxruntime's
adapter files give them.

A graph for a GPU (fast flavour) has three outputs more, which keep greedy decode steps on the device: `next_input_ids`,
`next_position_ids` `[batch_size, 1]` and `next_attention_mask` `[batch_size, total_sequence_length]` int64, a step's
inputs behind the one that made them: the token of the largest logit of the last position, the lowest of several; the
last position's successor; and, of a mask of ones and then zeros, one with a one more.
"""

from __future__ import annotations

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
TASK_ID = "task_id"
POSITION_BASE = "position_base"
LOGITS = "logits"

PAST, PRESENT, PREFIX = "past_key_values", "present", "prefix"
"""Groups of tensors with keys and values of each layer; see `tensor_names`."""
PARTS = ("key", "value")

BATCH, SEQUENCE, PAST_SEQUENCE, TOTAL_SEQUENCE, LOGITS_LENGTH = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
    "logits_length",
)
"""Names of axes; other clients make their empty caches from them."""

TOKEN_INPUTS = {
    INPUT_IDS: (BATCH, SEQUENCE),
    ATTENTION_MASK: (BATCH, TOTAL_SEQUENCE),
    POSITION_IDS: (BATCH, SEQUENCE),
}
"""The axes of the inputs that speak of tokens, int64, in the order of the graph's inputs."""

STEP_INPUTS = (INPUT_IDS, POSITION_IDS, ATTENTION_MASK)
NEXT_INPUTS = tuple(f"next_{name}" for name in STEP_INPUTS)
"""Outputs of a graph for a GPU, behind the others: the inputs of the greedy step that follows, in their order."""


def tensor_name(group: str, layer: int | str, part: str) -> str:
    """The name of one layer's keys or values, such as "past_key_values.0.key"."""
    return f"{group}.{layer}.{part}"


def tensor_names(group: str, layers: int) -> list[tuple[str, str]]:
    """For each layer the names of its keys and of its values."""
    return [(tensor_name(group, index, "key"), tensor_name(group, index, "value")) for index in range(layers)]
