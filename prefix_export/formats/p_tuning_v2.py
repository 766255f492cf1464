"""P-tuning v2's checkpoints: the whole model, including `prefix_encoder`, and the task's head.

`prefix_encoder.embedding.weight` is [prefix_length, 2 * layers * hidden], or [prefix_length, hidden] with an MLP
`prefix_encoder.trans` behind it (PEFT calls it `transform`).

The head is `classifier` or `qa_outputs`. If the head reads a pooler, the prefix includes the pooler too: the base may
have none, and then this checkpoint has the only copy of its random values. For RoBERTa too, the head is one linear
layer on the pooler, unlike transformers' own RoBERTa head. Text begins at position `prefix_length`.

Source: THUDM/P-tuning-v2 at 2873f47, `model/prefix_encoder.py`, `model/sequence_classification.py`; Liu et al.,
"P-Tuning v2", ACL 2022.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import ENCODER, ModelShape
from prefix_runtime import PrefixMismatchError, Source

from .shared.checkpoint import Checkpoint
from .shared.reparameterised import described, lead, required_lead, through_mlp, untrained
from .shared.trained import Trained, folded, make_prefix
from .shared.untrained import DEVIATION

NAME = "p-tuning-v2"
TITLE = "P-tuning v2"

_EMBEDDING = "prefix_encoder.embedding.weight"
_HEADS = ("classifier.", "qa_outputs.")
BASE_MODULE = "base_module"
"""Key of the metadata that holds the checkpoint's name of its base model, such as "roberta"."""
_MODULE = re.compile(r"(?:.*\.)?([a-z_]+)\.(?:pooler\.dense|embeddings|encoder\.layer)\..+")
_POOLER = ".pooler.dense."
# Their attention uses more than keys and values, or has not been compared with the original code.
_REFUSED = {"deberta.": "DeBERTa, whose prefix joins content scores alone", "transformer.": "ChatGLM, not verified"}


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a prefix encoder's embedding."""
    return lead(checkpoint, _EMBEDDING) is not None


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The prefix encoder's tensors, and the head."""
    required_lead(checkpoint, _EMBEDDING)
    parts = described(checkpoint, lambda name: "prefix_encoder." in name)
    head = ", ".join(_head(checkpoint))
    return {**parts, **({"head": head} if head else {})}


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`."""
    start = required_lead(checkpoint, _EMBEDDING)
    for name, model in _REFUSED.items():
        if start == name or any(each.startswith(name) for each in checkpoint.shapes):
            raise CheckpointError(f"{checkpoint.weights}: expected BERT or RoBERTa, found {model}; it is not read")
    numbers, stem = checkpoint.array(f"{start}{_EMBEDDING}"), f"{start}prefix_encoder.trans"
    warnings = []
    if any(name.startswith(f"{stem}.") for name in checkpoint.shapes):
        numbers = through_mlp(checkpoint, stem, numbers)
        # transformers initializes again what a base model's file does not hold.
        for deviation in (None, DEVIATION):
            warnings += untrained(checkpoint, [stem], "its code", deviation)
    if shape.kind != ENCODER or shape.architecture.startswith("deberta"):
        raise PrefixMismatchError(
            f"{checkpoint.weights}: expected an encoder of plain attention, found {shape.name!r} ({shape.kind})"
        )
    ((site, layers),) = shape.sites.items()
    prefix = make_prefix(
        {site: folded(numbers, layers, f"{checkpoint.weights}: {start}prefix_encoder")},
        moves_positions=True,
        source=Source(NAME, checkpoint.sha256),
        weights=checkpoint.weights,
        metadata=_base_module(checkpoint),
        head={name: checkpoint.array(full).astype(np.float32) for name, full in _head(checkpoint).items()},
    )
    return Trained({"": prefix}, tuple(warnings))


def _base_module(checkpoint: Checkpoint) -> dict[str, str]:
    modules = {match[1] for name in checkpoint.shapes if (match := _MODULE.fullmatch(name))}
    return {BASE_MODULE: modules.pop()} if len(modules) == 1 else {}


def _head(checkpoint: Checkpoint) -> dict[str, str]:
    """The head's names in the prefix and in the file, and the pooler's if there is a head."""
    own = {name: name for name in checkpoint.shapes if name.startswith(_HEADS)}
    pooler = {
        f"pooler.dense.{name.rpartition('.')[2]}": name
        for name in checkpoint.shapes
        if name.startswith(_POOLER.removeprefix(".")) or _POOLER in name
    }
    return own | (pooler if own else {})
