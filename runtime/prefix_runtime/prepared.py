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
from pathlib import Path

from .bundle import Bundle, staged
from .machine import processor_features
from .session import onnxruntime_version, save_opened
from .storage import PARTIAL_NAMES, locked

_SECOND = 10**9
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
    folder = _folder(bundle, provider)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{folder.parent}: expected a folder to keep graphs in, found that it cannot be made: {error.strerror}; "
            "name another in PREFIX_RUNTIME_CACHE"
        ) from error
    with locked(folder.parent):
        if (found := prepared_graph(bundle, provider)) is not None:
            return found  # another process was faster
        _remove(folder)
        with staged(folder) as staging:
            save_opened(bundle.graph_path, staging / bundle.graph_path.name, provider)
            (staging / _SIZES).write_text(json.dumps(_sizes(staging)), encoding="utf-8")
    return folder / bundle.graph_path.name


def prepared_graph(bundle: Bundle, provider: str = "cpu") -> Path | None:
    """The graph that `prepare` kept for this bundle on this machine, if there is one."""
    try:
        graph = _folder(bundle, provider) / bundle.graph_path.name
        kept = json.loads(graph.with_name(_SIZES).read_text(encoding="utf-8"))
        whole = _sizes(graph.parent) in (kept, _in_whole_seconds(kept))
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # none, a damaged one, or there can be none
        return None
    return graph if whole else None


def forget(bundle: Bundle, provider: str = "cpu") -> bool:
    """Remove what `prepare` kept; returns whether there was anything."""
    folder = _folder(bundle, provider)
    if not folder.parent.is_dir():
        return False
    with locked(folder.parent):
        return _remove(folder)


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


def _remove(folder: Path) -> bool:
    """Remove a kept graph, and what killed processes have left of any; with the lock held, nobody writes another."""
    found = [path for path in (folder, *folder.parent.glob(PARTIAL_NAMES)) if path.exists()]
    for path in found:
        shutil.rmtree(path)
    return bool(found)


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
    return cache_folder() / "prepared" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
