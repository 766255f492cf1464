"""Files that are there whole or not at all, and what proves that they are the right ones."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import BundleIntegrityError

_PIECE = 1 << 30
"""Bytes that are read at once; Linux gives at most 2 GiB."""


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, to read from; the caller closes it.

    A pipe, a device or a socket is refused, not waited for and not read.

    Raises:
        OSError: there is no such file, it cannot be read, or it is no regular one.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_at(descriptor: int, start: int, count: int) -> bytes:
    """So many bytes of a file from a place on; for one thread at a time, as it moves the descriptor's place.

    Raises:
        OSError: the file ends before.
    """
    pieces, place = [], start
    while place < start + count:
        os.lseek(descriptor, place, os.SEEK_SET)
        piece = os.read(descriptor, min(start + count - place, _PIECE))
        if not piece:
            raise OSError(errno.EIO, f"its end at byte {place}, before byte {start + count}: the file was shortened")
        pieces.append(piece)
        place += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The bytes of a regular file, opened once.

    Raises:
        OSError: as `open_regular`; or it has more than `most` bytes.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"{size} bytes, more than {most}", str(path))
        return read_at(descriptor, 0, size)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class FileIdentity:
    """What differs when a file is replaced or written to: device, inode, size, times of content and of inode in ns.

    The last is set by the system alone.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int


def identity(path: Path) -> FileIdentity:
    """A file's identity.

    Raises:
        OSError: there is none.
    """
    status = path.stat()
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a regular file's bytes, in hexadecimal.

    Raises:
        OSError: as `open_regular`.
    """
    with open(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, found: str, expected: str) -> None:
    """Refuse a file by the SHA-256 of its bytes.

    Raises:
        BundleIntegrityError
    """
    if found != expected:
        raise BundleIntegrityError(
            f"{path}: expected SHA-256 {expected}, found {found}; "
            "the file was changed or damaged: build or copy the bundle again"
        )


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

    A link in the place of the file is not followed.

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
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        yield True
    finally:
        os.close(descriptor)
