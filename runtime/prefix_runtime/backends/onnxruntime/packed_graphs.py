"""What onnxruntime makes of a graph when it opens it, kept for the next time.

Opening a graph optimises it and packs its weights for the processor, seconds for each gigabyte. `prepare` keeps the
result by the content of graph and weights, onnxruntime's version and the processor: in the user's cache folder, never
in the bundle, which may come from anywhere. A kept graph takes about twice the bundle's size; it is mapped, not read,
and its pages are shared between processes. The folder may be removed at any time.

A kept graph is opened without being hashed, which would take longer than opening it. So nobody else may be able to
change it: its folders have mode 0700, and a folder or file that another user owns or can write to is refused. Its
SHA-256 is recorded when it is kept; `prepare` compares it on request, an opening compares sizes and times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.bundle.staging import staged
from prefix_runtime.errors import BundleError, ProviderError
from prefix_runtime.files import PARTIAL_NAMES, locked, read_regular, sha256_of_file
from prefix_runtime.machine import processor_features
from prefix_runtime.private import NotPrivateError, check_private, make_private

from .library import onnxruntime_version
from .opening import save_opened

_PREPARED = "prepared"
_SECOND = 10**9
_FULL = 1 << 20
"""Bytes, less than which are left free on a full disk."""
_RECORD = "kept.json"
"""Size, time and SHA-256 of each kept file."""
_MAX_RECORD_BYTES = 1 << 20
_LAYOUT = 2
"""Of a kept folder; one of another layout is not looked at."""

_logger = logging.getLogger("prefix_runtime")


def pack_graph(bundle: Bundle, provider: str = "cpu", *, compares: bool = False) -> Path:
    """Open a bundle's graph once and keep what onnxruntime made of it; returns the kept graph.

    Args:
        bundle: whose graph.
        provider: the execution provider.
        compares: compare what was kept before with its SHA-256, and keep it anew where it differs.

    Raises:
        BundleIntegrityError: a file is not the one that the manifest names: nothing is kept under a false name.
        ProviderError: onnxruntime cannot open the graph.
        OSError: the disk is full, or the folder cannot be had; nothing is left behind.
    """
    packed = packed_graph(bundle, provider)
    if packed is not None and (not compares or _is_intact(packed.parent)):
        return packed
    bundle.verify()
    with writing():
        if packed is not None:
            remove(packed.parent)
        return make(bundle, provider)


@contextmanager
def writing(*, waits: bool = True) -> Iterator[bool]:
    """Be the one process that changes what is kept; what killed ones have left half-written is removed.

    Returns:
        Whether there was such.

    Raises:
        BlockingIOError: another process is, and this one is not to wait for it.
        OSError: the folder cannot be had.
    """
    folder = cache_folder() / _PREPARED
    try:
        make_private(folder.parent)
        make_private(folder)
    except NotPrivateError:
        raise
    except OSError as error:
        raise OSError(
            f"{folder}: expected a folder to keep graphs in, found that it cannot be made: {error.strerror}; "
            "name another in PREFIX_RUNTIME_CACHE"
        ) from error
    # A file's lock, as a network's file system may give none to a folder.
    lock = folder.with_name(f"{_PREPARED}.lock")
    with ExitStack() as stack:
        try:
            is_held = stack.enter_context(locked(lock, waits=waits))
            check_private(lock, is_folder=False)
        except (BlockingIOError, NotPrivateError):
            raise
        except OSError as error:
            raise OSError(
                f"{lock}: expected a file to write to, found none: {error.strerror}; name another folder in "
                "PREFIX_RUNTIME_CACHE"
            ) from error
        left = list(folder.glob(PARTIAL_NAMES)) if is_held else []
        for path in left:
            remove(path)
        yield bool(left)


def make(bundle: Bundle, provider: str = "cpu") -> Path:
    """Keep the graph of a verified bundle, if it was not kept before, while `writing`; errors as `prepare`."""
    if (packed := packed_graph(bundle, provider)) is not None:
        return packed  # another process was faster
    folder = _folder(bundle, provider)
    remove(folder)
    try:
        with staged(folder) as staging:
            staging.chmod(0o700)
            with _telling_what_cannot_be_written(staging):
                save_opened(bundle.graph_path, staging / bundle.graph_path.name, provider)
            bundle.check_unchanged()  # else it were kept under another's name
            _write_record(staging)
    except BundleError:
        if (packed := packed_graph(bundle, provider)) is None:
            raise
        return packed  # the same, where there are no locks
    return folder / bundle.graph_path.name


def packed_graph(bundle: Bundle, provider: str = "cpu") -> Path | None:
    """The graph that `prepare` kept for this bundle on this machine, if there is one."""
    try:
        folder = _folder(bundle, provider)
        for each in (folder.parent.parent, folder.parent, folder):
            check_private(each)
        kept = _read_record(folder)
        whole = _sizes(folder) in (kept, _in_whole_seconds(kept))
    except NotPrivateError as error:
        _logger.warning("%s; the bundle's own graph is opened", error)
        return None
    # None was kept, it is damaged, or there can be none.
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return folder / bundle.graph_path.name if whole else None


def forget(bundle: Bundle, provider: str = "cpu") -> bool:
    """Remove what `prepare` kept; returns whether there was anything."""
    folder = _folder(bundle, provider)
    if not os.path.lexists(folder) and not list(folder.parent.glob(PARTIAL_NAMES)):
        return False
    with writing() as was_left:
        return remove(folder) or was_left


def cache_folder() -> Path:
    """Where prepared graphs are kept: `PREFIX_RUNTIME_CACHE`, or `prefix-runtime` in the user's cache folder.

    Raises:
        OSError: the user has no home folder.
    """
    try:
        return _cache_folder()
    except RuntimeError as error:  # as Path has it
        raise OSError(f"PREFIX_RUNTIME_CACHE: expected a folder to keep graphs in, found none: {error}") from error


def _cache_folder() -> Path:
    if chosen := os.environ.get("PREFIX_RUNTIME_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "prefix-runtime"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefix-runtime"


def provider_folder(bundle: Bundle, provider: str) -> Path:
    """Where a provider may keep what it makes of a bundle's graph; `forget` removes it.

    Raises:
        OSError: the user has no home folder.
    """
    cache_folder()
    return _folder(bundle, provider)


def make_provider_folder(bundle: Bundle, provider: str) -> Path:
    """The folder of `provider_folder`, made where there is none; what lies in it is this user's alone.

    Raises:
        NotPrivateError: another user can write to it, or to a file in it.
        OSError: it cannot be made.
    """
    folder = provider_folder(bundle, provider)
    for each in (folder.parent.parent, folder.parent, folder):
        make_private(each)
    for path in folder.iterdir():
        check_private(path, is_folder=path.is_dir() and not path.is_symlink())
    return folder


def remove(path: Path) -> bool:
    """Remove a folder, or what is in its place; returns whether there was anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
    else:
        return False
    return True


@contextmanager
def _telling_what_cannot_be_written(staging: Path) -> Iterator[None]:
    """Of which onnxruntime says, in half a screen, that it cannot open the graph."""
    try:
        yield
    except ProviderError as error:
        if str(staging) not in str(error):
            raise
        reason = "the disk full" if shutil.disk_usage(staging).free < _FULL else "that it cannot be written"
        raise OSError(
            f"{staging.parent}: expected room for twice the bundle's size, found {reason}; make room, or name another "
            "folder in PREFIX_RUNTIME_CACHE"
        ) from error


def _write_record(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o600)  # onnxruntime goes by the umask
    hashes = {path.name: sha256_of_file(path) for path in folder.iterdir()}
    entries = {name: [*size, hashes[name]] for name, size in _sizes(folder).items()}
    path = folder / _RECORD
    path.touch(0o600)
    path.write_text(json.dumps(entries), encoding="utf-8")


def _read_record(folder: Path) -> dict[str, list[int]]:
    """Sizes and times of the kept files, as they were recorded."""
    check_private(folder / _RECORD, is_folder=False)
    entries = json.loads(read_regular(folder / _RECORD, _MAX_RECORD_BYTES))
    return {name: [size, time] for name, (size, time, _) in entries.items()}


def _is_intact(folder: Path) -> bool:
    """Whether the kept files have the SHA-256 that was recorded."""
    entries = json.loads(read_regular(folder / _RECORD, _MAX_RECORD_BYTES))
    return all(sha256_of_file(folder / name) == sha256 for name, (_, _, sha256) in entries.items())


def _sizes(folder: Path) -> dict[str, list[int]]:
    """Size and time of each file.

    Raises:
        NotPrivateError: somebody else can write to one.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.name != _RECORD]
    statuses = {path.name: check_private(path, is_folder=False) for path in paths}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in statuses.items()}


def _in_whole_seconds(sizes: dict[str, list[int]]) -> dict[str, list[int]]:
    """As an archive keeps them, which a folder may have been in."""
    return {name: [size, time // _SECOND * _SECOND] for name, (size, time) in sizes.items()}


def _folder(bundle: Bundle, provider: str) -> Path:
    manifest = bundle.manifest
    identity = {
        "layout": _LAYOUT,
        "graph": manifest.graph,
        "files": {name: manifest.files[name].sha256 for name in sorted(manifest.files)},
        "onnxruntime": onnxruntime_version(),
        "provider": provider,
        "machine": [platform.system(), platform.machine(), processor_features()],
    }
    return cache_folder() / _PREPARED / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
