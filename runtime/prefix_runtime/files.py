"""Files that are there whole or not at all, and what proves that they are the right ones."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import BundleIntegrityError

_HASHED_AT_ONCE = 4 << 20
_PLENTY = 1 << 30
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


def sha256_of_file(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> str:
    """The SHA-256 of a regular file's bytes, in hexadecimal; the listener is told how many bytes more were read.

    Raises:
        OSError: as `open_regular`.
    """
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        while part := file.read(_HASHED_AT_ONCE):
            digest.update(part)
            on_bytes(len(part))
    return digest.hexdigest()


def check_sha256(path: Path, actual: str, expected: str) -> None:
    """Refuse a file by the SHA-256 of its bytes.

    Raises:
        BundleIntegrityError: the bytes have another hash; copy the bundle again.
    """
    if actual != expected:
        raise BundleIntegrityError(
            f"{path}: expected SHA-256 {expected}, found {actual}; "
            "the file was changed or damaged: build or copy the bundle again"
        )


def partial_name(path: Path) -> Path:
    """A sibling that nobody uses, hidden, for what is not yet whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


PARTIAL_NAMES = ".*.partial"
"""The pattern of what `partial_name` makes."""
_PARTIAL_NAME = re.compile(r"(?<![^/\\'\"\s])\.([^/\\]+)\.[0-9a-f]{8}\.partial(?![^/\\'\":,;\s])")


def without_partial_names(text: str) -> str:
    """A path or a message in which names of `partial_name` are the names that the user gave."""
    return _PARTIAL_NAME.sub(r"\1", text)


@contextmanager
def blaming(path: Path, partial: Path) -> Iterator[None]:
    """Let errors of the operating system name the path that the user gave, not its partial sibling or nothing."""
    try:
        yield
    except OSError as error:
        named = error.filename
        if error.errno is None or (named is not None and not _is_within(named, partial)):
            raise
        inside = Path(os.fsdecode(named)).relative_to(partial) if named is not None else Path()
        # The room is measured before what is half-written is removed.
        text = no_space(path) if error.errno == errno.ENOSPC and _is_plain(error) else error.strerror
        raise OSError(error.errno, text, str(path / inside)) from error


def _is_plain(error: OSError) -> bool:
    """Whether an error has the operating system's own text, not a better one."""
    return error.errno is not None and error.strerror == os.strerror(error.errno)


def _is_within(named: object, folder: Path) -> bool:
    return isinstance(named, str | bytes) and Path(os.fsdecode(named)).is_relative_to(folder)


def check_room(path: Path, needed: int) -> None:
    """Refuse to write so many bytes at a path if the disk has no room for them.

    Raises:
        OSError: of the number ENOSPC, naming both sizes.
    """
    free = free_bytes(path)
    if free < needed:
        text = f"disk full: needs {shown_size(needed)}, {shown_size(free)} free; make room, or write elsewhere"
        raise OSError(errno.ENOSPC, text, str(path))


def no_space(path: Path | None) -> str:
    """What a full disk means for whoever wrote to a path on it; None if the path is not known."""
    free = math.inf if path is None else free_bytes(path)
    if free == math.inf:
        return "disk full; make room, or write elsewhere"
    if free > _PLENTY:
        return f"the disk takes no more, although {shown_size(free)} are free; look at its number of files (df -i)"
    return f"disk full: {shown_size(free)} free; make room, or write elsewhere"


def shown_size(size: float) -> str:
    """Bytes as a person reads them, in units of 1000."""
    if size < 1000:
        return f"{size:.0f} bytes"
    unit, scale = next(each for each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= each[1])
    shown = size / scale
    return f"{shown:.0f} {unit}" if shown >= 100 else f"{shown:.1f} {unit}"


def free_bytes(path: Path) -> float:
    """Free bytes where a path is, or would be; infinite if the file system does not say."""
    place = path.absolute()
    while not os.path.exists(place) and place != place.parent:  # noqa: PTH110  # Path's raises if a name is too long
        place = place.parent
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return math.inf
    return usage.free if usage.total else math.inf


def write_file_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is as it was.
    """
    partial = partial_name(path)
    check_room(path, len(content))
    try:
        with blaming(path, partial):
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        with suppress(OSError):  # what is wrong with the place was said
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
