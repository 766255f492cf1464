"""The project's own prefix file, see `prefix_runtime.Prefix`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prefix_runtime import Geometry, Prefix, PrefixError
from prefix_runtime.prefix import is_prefix_file
from prefix_runtime.tensor_file import TensorFile

NAME = "prefix file (safetensors)"


def matches(path: Path) -> bool:
    """Whether the file says that it is a prefix file."""
    if not path.is_file():
        return False
    try:
        return is_prefix_file(TensorFile(path))
    except PrefixError:
        return False


def describe(path: Path) -> Mapping[str, str]:
    """Sites, layers, heads, length, positions, origin."""
    return Prefix.load(path).describe()


def read(path: Path, geometry: Geometry) -> Prefix:
    """The prefix, as it is in the file."""
    prefix = Prefix.load(path)
    geometry.check_prefix(prefix, str(path))
    return prefix
