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

The decoder of an encoder-decoder has the sites in its tensors' names, as in optimum: its past is
`past_key_values.{i}.decoder.key`, and it reads the source's keys and values, `past_key_values.{i}.encoder.key`
`[batch_size, num_key_value_heads, cross_capacity, head_dim]`, under `encoder_attention_mask`
`[batch_size, encoder_total_length]` int64: cross prefix and source. The encoder's graph computes these keys and values
and writes them into the same buffers, row by row behind `cross_prefix_length` `[batch_size]` int64. It takes
`input_ids`, `attention_mask` `[batch_size, encoder_sequence_length]`, a prefix of its own `prefix.{i}.key`, `.value`
and `prefix_mask` `[batch_size, prefix_length]` int64. T5 counts positions by slots: `query_offset` `[batch_size]` int64
is the first query's slot, and the bias is 0 over the first `zero_bias_length` `[batch_size]` int64 slots.

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
ENCODER_ATTENTION_MASK = "encoder_attention_mask"
PREFIX_MASK = "prefix_mask"
CROSS_PREFIX_LENGTH = "cross_prefix_length"
QUERY_OFFSET = "query_offset"
ZERO_BIAS_LENGTH = "zero_bias_length"
LAST_HIDDEN_STATE = "last_hidden_state"

PAST, PRESENT, PREFIX = "past_key_values", "present", "prefix"
"""Groups of tensors with keys and values of each layer; see `tensor_names`."""
PARTS = ("key", "value")

SELF, SOURCE = "decoder", "encoder"
"""Sites in the names of an encoder-decoder's tensors: the decoder's own past, and what it reads of the source."""

BATCH, SEQUENCE, PAST_SEQUENCE, TOTAL_SEQUENCE, LOGITS_LENGTH = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
    "logits_length",
)
ENCODER_SEQUENCE, ENCODER_TOTAL, PREFIX_LENGTH, CROSS_CAPACITY = (
    "encoder_sequence_length",
    "encoder_total_length",
    "prefix_length",
    "cross_capacity",
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


def tensor_name(group: str, layer: int | str, part: str, site: str | None = None) -> str:
    """The name of one layer's keys or values: "past_key_values.0.key", or "past_key_values.0.decoder.key" of a site."""
    return ".".join(filter(None, (group, str(layer), site, part)))


def tensor_names(group: str, layers: int, site: str | None = None) -> list[tuple[str, str]]:
    """For each layer the names of its keys and of its values."""
    key, value = PARTS
    return [(tensor_name(group, index, key, site), tensor_name(group, index, value, site)) for index in range(layers)]
