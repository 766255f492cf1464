"""What onnxruntime makes of a graph when it opens it, kept for the next time.

Opening a graph optimises it and packs its weights for the processor, seconds for each gigabyte. `prepare` keeps the
result by the content of graph and weights, onnxruntime's version and the processor: in the user's cache folder, never
in the bundle, which may come from anywhere. A kept graph takes about twice the bundle's size; it is mapped, not read,
and its pages are shared between processes. The folder may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .bundle import Bundle, staged
from .errors import BundleError, ProviderError
from .machine import processor_features
from .session import onnxruntime_version, save_opened
from .storage import PARTIAL_NAMES, locked

_PREPARED = "prepared"
_SECOND = 10**9
_FULL = 1 << 20
"""Bytes, less than which are left free on a full disk."""
_SIZES = "sizes.json"
"""Sizes and times of the kept files: one that was changed is noticed, and the bundle's own graph opened."""


def prepare(bundle: Bundle, provider: str = "cpu") -> Path:
    """Open a bundle's graph once and keep what onnxruntime made of it; returns the kept graph.

    Raises:
        BundleIntegrityError: a file is not the one that the manifest names: nothing is kept under a false name.
        ProviderError: onnxruntime cannot open the graph.
        OSError: the disk is full, or the folder cannot be had; nothing is left behind.
    """
    if (found := prepared_graph(bundle, provider)) is not None:
        return found
    bundle.verify()
    with writing():
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
        folder.mkdir(parents=True, exist_ok=True)
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
        except BlockingIOError:
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
    if (found := prepared_graph(bundle, provider)) is not None:
        return found  # another process was faster
    folder = _folder(bundle, provider)
    remove(folder)
    try:
        with staged(folder) as staging:
            with _telling_what_cannot_be_written(staging):
                save_opened(bundle.graph_path, staging / bundle.graph_path.name, provider)
            (staging / _SIZES).write_text(json.dumps(_sizes(staging)), encoding="utf-8")
    except BundleError:
        if (found := prepared_graph(bundle, provider)) is None:
            raise
        return found  # the same, where there are no locks
    return folder / bundle.graph_path.name


def prepared_graph(bundle: Bundle, provider: str = "cpu") -> Path | None:
    """The graph that `prepare` kept for this bundle on this machine, if there is one."""
    try:
        graph = _folder(bundle, provider) / bundle.graph_path.name
        kept = json.loads(graph.with_name(_SIZES).read_text(encoding="utf-8"))
        whole = _sizes(graph.parent) in (kept, _in_whole_seconds(kept))
    # None was kept, it is damaged, or there can be none.
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return graph if whole else None


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
        found = "the disk full" if shutil.disk_usage(staging).free < _FULL else "that it cannot be written"
        raise OSError(
            f"{staging.parent}: expected room for twice the bundle's size, found {found}; make room, or name another "
            "folder in PREFIX_RUNTIME_CACHE"
        ) from error


def _sizes(folder: Path) -> dict[str, list[int]]:
    found = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.name != _SIZES}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def _in_whole_seconds(sizes: dict[str, list[int]]) -> dict[str, list[int]]:
    """As an archive keeps them, which a folder may have been in."""
    return {name: [size, time // _SECOND * _SECOND] for name, (size, time) in sizes.items()}


def _folder(bundle: Bundle, provider: str) -> Path:
    manifest = bundle.manifest
    identity = {
        "graph": manifest.graph,
        "files": {name: manifest.files[name].sha256 for name in sorted(manifest.files)},
        "onnxruntime": onnxruntime_version(),
        "provider": provider,
        "machine": [platform.system(), platform.machine(), processor_features()],
    }
    return cache_folder() / _PREPARED / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
