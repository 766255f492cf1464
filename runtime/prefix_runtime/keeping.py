"""Whose graphs are kept as onnxruntime packs them: those asked for, and by themselves large ones opened again.

Packing takes seconds from about a gigabyte on. To keep what comes of it takes several times as long, once, and pays
only where the cache folder outlives the process, as that of a container may not. So the first opening of a large bundle
leaves a mark, and a later one that finds it keeps the graph, under a mark of its own. With the graph that one is
touched by each opening, and says when it was used last; without, when an attempt failed, or a process was killed over
it. A bundle of 4 bits packs fast, and its steps are slower from a kept graph.
"""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path

from .bundle import Bundle
from .errors import PrefixRuntimeError
from .prepared import forget as _forget
from .prepared import make, prepare, prepared_graph, provider_folder, remove, writing

LARGE = 1 << 30
"""Bytes of a bundle's graph and weights, from which on it is packed for seconds."""
SETTLED = 60.0
"""Seconds after which a mark is an earlier start's, not that of another process of this one."""
PAUSE = 24 * 3600.0
"""Seconds after which it is tried again where it failed, or a process was killed over it."""
UNUSED = 30 * 24 * 3600.0
"""Seconds after which a graph that was kept by itself, and not opened since, makes room when another is kept."""
_ROOM = 4
"""Times the bundle's size that must be free: a kept graph takes twice as much, half of the free disk."""

_logger = logging.getLogger("prefix_runtime")


def find_or_keep(bundle: Bundle, keeps: bool | None = None) -> Path | None:
    """What was kept of a bundle's graph for the CPU, or is now; None where nothing is.

    Args:
        bundle: whose graph.
        keeps: keep it first, for good; None keeps it where it is large and is opened again, and says nothing of what
            goes wrong but in the log; False never does.

    Raises:
        BundleIntegrityError, ProviderError, OSError: as `prepared.prepare`, where it is asked for.
    """
    if keeps:
        return keep(bundle)
    found = prepared_graph(bundle)
    with suppress(OSError):  # another process is at it, or the folder cannot be had, or is not to be written
        if found is not None:
            _touch_if_there(_marks(bundle)[1])
        elif keeps is None and _size(bundle) >= LARGE and bundle.manifest.precision != "int4":
            with writing(waits=False):
                found = prepared_graph(bundle)  # another process was faster
                if found is None and _is_due(bundle):
                    found = _kept(bundle)
    return found


def keep(bundle: Bundle) -> Path:
    """Keep a graph for good, if it was not kept before; returns it. Errors as `prepared.prepare`."""
    graph = prepare(bundle)
    _unmark(bundle)
    return graph


def forget(bundle: Bundle) -> bool:
    """Remove what was kept; returns whether there was anything. A large bundle begins anew."""
    _unmark(bundle)
    return _forget(bundle)


def _is_due(bundle: Bundle) -> bool:
    """Whether a large bundle is to be kept now; leaves the mark that says so to a later opening."""
    opened, kept = _marks(bundle)
    mark, wait = (kept, PAUSE) if kept.exists() else (opened, SETTLED)
    if mark is kept and remove(kept.with_suffix("")):  # it is not whole any more
        _unmark(bundle)
        return False
    if not mark.exists():
        mark.touch(exist_ok=False)
        return False
    if time.time() - mark.stat().st_mtime < wait:
        return False
    _remove_unused(opened.parent)
    return shutil.disk_usage(opened.parent).free >= _ROOM * _size(bundle)


def _kept(bundle: Bundle) -> Path | None:
    opened, kept = _marks(bundle)
    kept.touch()
    _logger.info("%s: keeping the graph as it is packed, in %s, for later openings", bundle.root, kept.parent)
    try:
        bundle.verify()
        graph = make(bundle)
    except (OSError, PrefixRuntimeError) as error:
        _logger.warning(
            "%s: its graph could not be kept, and is packed at every opening: %s; it is tried again tomorrow, and by "
            "prefix-runtime prepare at once",
            bundle.root,
            error,
        )
        return None
    except BaseException:
        with suppress(OSError):
            kept.unlink()  # the next opening tries again
        raise
    with suppress(OSError):
        opened.unlink()
    return graph


def _remove_unused(folder: Path) -> None:
    for mark in (*folder.glob("*.kept"), *folder.glob("*.opened")):
        with suppress(OSError):  # another process has removed it
            if time.time() - mark.stat().st_mtime > UNUSED:
                if mark.suffix == ".kept":
                    remove(mark.with_suffix(""))
                mark.unlink()


def _marks(bundle: Bundle) -> tuple[Path, Path]:
    """Of a bundle that was opened, and of one that was kept by itself, or was to be."""
    folder = provider_folder(bundle, "cpu")
    return folder.with_suffix(".opened"), folder.with_suffix(".kept")


def _unmark(bundle: Bundle) -> None:
    for mark in _marks(bundle):
        with suppress(OSError):
            mark.unlink()


def _touch_if_there(mark: Path) -> None:
    if mark.exists():
        mark.touch()


def _size(bundle: Bundle) -> int:
    return sum(entry.size for entry in bundle.manifest.files.values())
