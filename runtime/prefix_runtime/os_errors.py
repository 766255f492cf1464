"""Errors of the operating system as a person can act on them: the user's path, what is wrong, what to do."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from .files import free_bytes, no_space, without_partial_names

_FOUND = {
    errno.EDQUOT: "the disk quota is used up; remove files, or write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "permission denied; change its permissions, or name another place",
    errno.EPERM: "permission denied; change its permissions, or name another place",
    errno.ENAMETOOLONG: "the name is too long; shorten the path",
    errno.EISDIR: "expected a file, found a folder",
    errno.ENOTDIR: "expected a folder, found a file in its path",
    errno.ENOENT: "no such file or folder",
    errno.EEXIST: "it exists already; remove it, or name another place",
    errno.EMFILE: "too many open files; raise the limit with: ulimit -n",
    errno.ENFILE: "too many open files on this machine; close other programs",
    errno.EFBIG: "the file would be larger than the file system or a limit (ulimit -f) allows",
    errno.ELOOP: "symbolic links lead in a circle",
    errno.EIO: "the device cannot be read or written (input/output error)",
}
_RUSTS_NUMBER = re.compile(r"\(os error (\d+)\)")
_NUMPYS_PART = re.compile(r"\d+ requested and \d+ written")
_NEARLY_FULL = 1 << 20


def described(error: OSError) -> str:
    """An error as one sentence: path, what is wrong, what to do."""
    if error.errno is None:
        return without_partial_names(str(error))
    where = f"{shown}: " if (shown := _shown_path(error)) else ""
    if error.strerror and error.strerror != os.strerror(error.errno):
        return f"{where}{without_partial_names(error.strerror)}"
    if error.errno == errno.ENOSPC:
        return f"{where}{no_space(Path(os.fsdecode(error.filename)) if where else None)}"
    return f"{where}{_FOUND.get(error.errno, str(error.strerror).lower())}"


def write_error(path: Path, error: BaseException) -> OSError:
    """The error of the operating system behind what a library raised when it could not write to a path.

    Rust's libraries put the number into the text, numpy leaves it out (`tofile`, 2.4), protobuf has texts of its own.
    """
    number = os_error_behind(error)
    if number is not None:
        return OSError(number, no_space(path) if number == errno.ENOSPC else os.strerror(number), str(path))
    if _NUMPYS_PART.search(str(error)) or free_bytes(path) < _NEARLY_FULL:
        return OSError(errno.ENOSPC, no_space(path), str(path))
    return OSError(errno.EIO, f"cannot be written: {' '.join(str(error).split())}", str(path))


def os_error_behind(error: BaseException) -> int | None:
    """The number of the operating system's error that an error is, or names in its text as Rust's libraries do."""
    if isinstance(error, OSError):
        return error.errno
    match = _RUSTS_NUMBER.search(str(error))
    return int(match[1]) if match else None


def _shown_path(error: OSError) -> str:
    named = error.filename
    if not isinstance(named, str | bytes):  # a descriptor's number says nothing
        return ""
    return without_partial_names(os.fsdecode(named))
