"""Readers of trained checkpoints: one module a family, chosen by what a checkpoint holds, never by a file's name.

A reader has a `NAME`, which `--format` takes, a `TITLE` for people, and three functions: `matches(checkpoint)`, whether
it is of its family; `describe(checkpoint)`, what it says of itself; `read(checkpoint, shape)`, what it holds
(`Trained`). The last two are also asked of what does not match, as `--format` overrules, and say so with an error of
their own. Readers never write and know no ONNX; `checkpoint` opens files for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import ModelShape

from . import (
    adapterhub,
    canonical,
    control_prefixes,
    keys_values,
    li_liang,
    lone_array,
    openprompt,
    p_tuning_v2,
    soft_prompt,
    unified_skg,
)
from .peft import reader as peft
from .shared.checkpoint import Checkpoint, open_checkpoint
from .shared.trained import SoftPrompt, Trained

# Control Prefixes come before Li and Liang's, whose tensors theirs may be but for their rows.
READERS: tuple[ModuleType, ...] = (
    canonical,
    peft,
    adapterhub,
    p_tuning_v2,
    openprompt,
    unified_skg,
    control_prefixes,
    li_liang,
    keys_values,
    lone_array,
    soft_prompt,
)
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""What a part may be called: it becomes a file's name, and a task's."""

FORMATS = tuple(reader.NAME for reader in READERS)

__all__ = ["FORMATS", "READERS", "SoftPrompt", "Trained", "check_format", "describe", "find_reader", "read"]


def check_format(wanted: str | None) -> None:
    """Refuse the name of a format that there is none of; None stands for any.

    Raises:
        CheckpointError: the message lists the formats.
    """
    if wanted is not None and wanted not in FORMATS:
        raise CheckpointError(f"format: expected one of {', '.join(FORMATS)}, found {wanted!r}")


def find_reader(path: Path, wanted: str | None = None) -> tuple[ModuleType, Checkpoint]:
    """The reader for a file or folder, and the checkpoint opened.

    Args:
        path: a file or folder.
        wanted: of `FORMATS`, whatever the checkpoint's content says.

    Raises:
        CheckpointError: nothing is there, or nothing that a reader knows.
        PrefixError: a safetensors file that is damaged.
    """
    check_format(wanted)
    checkpoint = open_checkpoint(path)
    for reader in READERS:
        if wanted == reader.NAME or (wanted is None and reader.matches(checkpoint)):
            return reader, checkpoint
    known = ", ".join(f"{reader.TITLE} ({reader.NAME})" for reader in READERS)
    raise CheckpointError(f"{checkpoint.weights}: expected one of: {known}; found {_shown(checkpoint)}")


def _shown(checkpoint: Checkpoint) -> str:
    """What a checkpoint of no family holds, as far as it says."""
    kind = (checkpoint.config(peft.CONFIG_NAME) or {}).get("peft_type")
    names = ", ".join(repr(name) for name in list(checkpoint.shapes)[:4]) or "none"
    return f"a PEFT adapter of kind {kind!r}" if kind else f"tensors {names}, of no such kind"


def describe(path: Path, wanted: str | None = None) -> Mapping[str, str]:
    """What a checkpoint says of itself, for people.

    Raises:
        CheckpointError: no reader knows the file, or several do; name the format.
        PrefixError: the canonical file is damaged.
    """
    reader, checkpoint = find_reader(path, wanted)
    facts: Mapping[str, str] = reader.describe(checkpoint)
    if checkpoint.notes:
        facts = {"file": checkpoint.weights.relative_to(checkpoint.path).as_posix(), **facts}
    return {"format": reader.TITLE, **{_printable(name): _printable(text) for name, text in facts.items()}}


def _printable(text: str) -> str:
    """A text from outside, without what would steer a terminal or is no text."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def read(path: Path, shape: ModelShape, wanted: str | None = None) -> Trained:
    """What a checkpoint holds: keys and values, or soft prompts that only the model can turn into them.

    Args:
        path: a file or folder.
        shape: of the base model.
        wanted: see `find_reader`.

    Raises:
        CheckpointError: not a checkpoint that can be read, or damaged.
        PrefixError, PrefixMismatchError: NaN, infinity, or trained for a model of another shape.
    """
    reader, checkpoint = find_reader(path, wanted)
    trained: Trained = reader.read(checkpoint, shape)
    trained = replace(trained, warnings=(*checkpoint.notes, *trained.warnings))
    for name in trained.parts:
        if name and not _PART.fullmatch(name):
            raise CheckpointError(
                f"{checkpoint.weights}: expected names of letters, digits, '_', '-' and '.', found {name!r:.60}"
            )
    return trained
