"""Readers of trained checkpoints: one module a family, chosen by what a file holds.

A reader has a `NAME` and three functions: `matches(path)`, whether the file or folder is of its family;
`describe(path)`, what it says of itself; `read(path, geometry)`, its `Prefix`. Readers never write, know no ONNX, and
never unpickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from prefix_export.errors import CheckpointError
from prefix_runtime import Geometry, Prefix
from prefix_runtime.tensor_file import TensorFile

from . import canonical, peft

READERS: tuple[ModuleType, ...] = (canonical, peft)


def find_reader(path: Path) -> ModuleType:
    """The reader for a file or folder.

    Raises:
        CheckpointError: nothing is there, or nothing that a reader knows.
        PrefixError: a safetensors file that is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: expected a prefix file or an adapter folder, found nothing there")
    for reader in READERS:
        if reader.matches(path):
            return reader
    if path.is_file() and path.suffix == ".safetensors":
        TensorFile(path)  # a damaged file is told from one of another kind
    if path.is_dir():
        raise CheckpointError(f"{path}: expected an adapter folder with {peft.CONFIG_NAME}, found a folder without")
    raise CheckpointError(
        f"{path}: expected one of: {', '.join(reader.NAME for reader in READERS)}; found neither; "
        "pickled checkpoints (.bin, .pt) are not read: save them as safetensors"
    )


def describe(path: Path) -> Mapping[str, str]:
    """What a checkpoint says of itself, for people.

    Raises:
        CheckpointError, PrefixError
    """
    reader = find_reader(path)
    return {"format": reader.NAME, **reader.describe(path)}


def read(path: Path, geometry: Geometry) -> Prefix:
    """The prefix in a checkpoint, folded to keys and values.

    Args:
        path: a file or an adapter folder.
        geometry: of the base model.

    Raises:
        CheckpointError: not a checkpoint that can be read, or damaged.
        PrefixError, PrefixMismatchError: NaN, infinity, or a prefix for a model of another shape.
    """
    prefix: Prefix = find_reader(path).read(path, geometry)
    return prefix


def doubt_of_base(prefix: Prefix, name: str) -> str | None:
    """What to tell a user whose prefix says that it was trained on a base model of another name, or None."""
    said = prefix.metadata.get("base_model", "")
    if not said or Path(said).name == Path(name).name:
        return None
    return f"the prefix says that it was trained on {said!r}, not on {name!r}"
