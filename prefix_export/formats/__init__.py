"""Readers of trained checkpoints: one module per family, chosen by a checkpoint's content, never by its file name.

A reader has a `NAME` for `--format`, a `TITLE` for people, and three functions:

- `matches(checkpoint)` says whether the checkpoint is of the reader's family.
- `describe(checkpoint)` returns facts about the checkpoint for people.
- `read(checkpoint, shape)` returns its content (`Trained`).

`--format` can send a checkpoint of another family to `describe` and `read`; they then raise an error of their own.
Readers never write and do not know ONNX. `shared.checkpoint` opens files for them.
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

# Control Prefixes come before Li and Liang's: their tensors can have the same names, with more rows.
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
"""Permitted names of parts: a name becomes a file name and a task name."""

FORMATS = tuple(reader.NAME for reader in READERS)

__all__ = ["FORMATS", "READERS", "SoftPrompt", "Trained", "check_format", "describe", "find_reader", "read"]


def check_format(format_name: str | None) -> None:
    """Refuse an unknown format name; None stands for any format.

    Raises:
        CheckpointError: the format is unknown; the message lists the formats.
    """
    if format_name is not None and format_name not in FORMATS:
        raise CheckpointError(f"format: expected one of {', '.join(FORMATS)}, found {format_name!r}")


def find_reader(path: Path, format_name: str | None = None) -> tuple[ModuleType, Checkpoint]:
    """The reader for a file or folder, and the opened checkpoint.

    Args:
        path: a file or folder.
        format_name: one of `FORMATS`; overrules the checkpoint's content. None chooses by content.

    Raises:
        CheckpointError: the path does not exist, or no reader knows its content; the message lists the formats.
        PrefixError: the safetensors file is damaged; copy or download it again.
    """
    check_format(format_name)
    checkpoint = open_checkpoint(path)
    for reader in READERS:
        if format_name == reader.NAME or (format_name is None and reader.matches(checkpoint)):
            return reader, checkpoint
    known = ", ".join(f"{reader.TITLE} ({reader.NAME})" for reader in READERS)
    raise CheckpointError(f"{checkpoint.weights}: expected one of: {known}; found {_shown(checkpoint)}")


def _shown(checkpoint: Checkpoint) -> str:
    """The content of a checkpoint that no reader knows, for a message."""
    kind = (checkpoint.config(peft.CONFIG_NAME) or {}).get("peft_type")
    names = ", ".join(repr(name) for name in list(checkpoint.shapes)[:4]) or "none"
    return f"a PEFT adapter of kind {kind!r}" if kind else f"tensors {names}, of no such kind"


def describe(path: Path, format_name: str | None = None) -> Mapping[str, str]:
    """Facts about a checkpoint, for people: its format first, then what its reader can tell.

    Args:
        path: a file or folder.
        format_name: see `find_reader`.

    Raises:
        CheckpointError: no reader knows the file; the message lists the formats. Name one of them to force it.
        PrefixError: the prefix file is damaged; copy or download it again.
    """
    reader, checkpoint = find_reader(path, format_name)
    facts: Mapping[str, str] = reader.describe(checkpoint)
    if checkpoint.notes:
        facts = {"file": checkpoint.weights.relative_to(checkpoint.path).as_posix(), **facts}
    return {"format": reader.TITLE, **{_printable(name): _printable(text) for name, text in facts.items()}}


def _printable(text: str) -> str:
    """A text from a file, with control characters escaped so that they cannot control the terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def read(path: Path, shape: ModelShape, format_name: str | None = None) -> Trained:
    """The content of a checkpoint: keys and values, or soft prompts that only the model can turn into keys and values.

    Args:
        path: a file or folder.
        shape: the shape of the base model.
        format_name: see `find_reader`.

    Raises:
        CheckpointError: the checkpoint cannot be read or is damaged; the message says what to do.
        PrefixError: the checkpoint contains NaN or infinity; training diverged, use another checkpoint.
        PrefixMismatchError: the checkpoint was trained for a model of another shape; name that model.
    """
    reader, checkpoint = find_reader(path, format_name)
    trained: Trained = reader.read(checkpoint, shape)
    trained = replace(trained, warnings=(*checkpoint.notes, *trained.warnings))
    for name in trained.parts:
        if name and not _PART.fullmatch(name):
            raise CheckpointError(
                f"{checkpoint.weights}: expected names of letters, digits, '_', '-' and '.', found {name!r:.60}"
            )
    return trained
