"""Folders and files that no other user can write to: what lies in them may be run without being hashed each time."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotPrivateError(OSError):
    """Another user can write to a folder or file, or could choose what it is."""


def make_private(folder: Path) -> None:
    """Make a folder that this user alone can use, mode 0700, if it is not there.

    Folders above it that are not there are made as usual.

    Raises:
        NotPrivateError: what is there is no folder, a link, of another user, or writable by others.
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(0o700)
    except FileExistsError:
        check_private(folder)


def check_private(path: Path, *, is_folder: bool = True) -> os.stat_result:
    """Refuse a folder, or a file, that another user can write to or has put there; returns its status.

    This user and root may own it. No link is followed. On Windows, where a user's folders are the user's own, only the
    kind is looked at.

    Raises:
        NotPrivateError: saying what is wrong with it.
        OSError: there is nothing, or no folder.
    """
    status = path.lstat()
    if is_folder and not stat.S_ISDIR(status.st_mode) and not stat.S_ISLNK(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if (fault := _wrong(status, is_folder=is_folder)) is not None:
        kind = "folder" if is_folder else "file"
        raise NotPrivateError(
            f"{path}: expected a {kind} of this user's that nobody else can write to, found {fault}; remove it, or "
            "name another folder in PREFIX_RUNTIME_CACHE"
        )
    return status


def _wrong(status: os.stat_result, *, is_folder: bool) -> str | None:
    mode = status.st_mode
    if stat.S_ISLNK(mode):
        return "a link"
    if not is_folder and not stat.S_ISREG(mode):
        return "no regular file"
    if os.name == "nt":
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"one of user {status.st_uid}'s"
    return f"mode {stat.S_IMODE(mode):04o}" if mode & _OTHERS_MAY_WRITE else None
