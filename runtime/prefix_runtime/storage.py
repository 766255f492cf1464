"""Files that are there whole or not at all, and what proves that they are the right ones."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_name(path: Path) -> Path:
    """A sibling that nobody uses, hidden, for what is not yet whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


PARTIAL_NAMES = ".*.partial"
"""The pattern of what `partial_name` makes."""


def write_file_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is as it was.
    """
    partial = partial_name(path)
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Push every file of a folder, and the folder itself, to the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def sync_folder(folder: Path) -> None:
    """Push a folder's own entries (names that were added, replaced or removed) to the disk."""
    _sync(folder)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no handle for a folder.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, waits: bool = True) -> Iterator[bool]:
    """Hold the advisory lock of a folder, or of a file that is made for it, so that no change is lost to another's.

    Returns:
        Whether it is held: Windows has no such locks; there changes stay atomic, and concurrent ones may be lost.

    Raises:
        BlockingIOError: another process holds it, and this one is not to wait.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        yield True
    finally:
        os.close(descriptor)
