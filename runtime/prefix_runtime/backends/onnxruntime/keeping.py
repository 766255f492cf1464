"""Whose graphs are kept as onnxruntime packs them: those asked for, and large ones by themselves.

Packing takes seconds from about a gigabyte on. So the first opening of a bundle that large keeps what comes of it,
which takes several times as long, once; what is kept so has a mark beside it, which each opening touches. A mark alone
is of an attempt that failed, or over which a process was killed. A bundle of 4 bits packs fast, and its steps are
slower from a kept graph.
"""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.errors import BundleIntegrityError, PrefixRuntimeError

from .packed_graphs import forget, make, prepare, prepared_graph, provider_folder, remove, writing

LARGE = 1 << 30
"""Bytes of a bundle without its prefixes, nearly all weights, from which on it is packed for seconds."""
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
        keeps: keep it first, for good; None keeps it where it is large, and says nothing of what goes wrong but in the
            log; False never does.

    Raises:
        BundleIntegrityError: the graph that is to be kept is not the one that the manifest names.
        ProviderError, OSError: as `prepared.prepare`, where it is asked for.
    """
    if keeps:
        return keep(bundle)
    found = prepared_graph(bundle)
    with suppress(OSError):  # another process is at it, or the folder cannot be had, or is not to be written
        if found is not None:
            _touch_if_there(_mark(bundle))
        elif keeps is None and _size(bundle) >= LARGE and bundle.manifest.precision != "int4":
            with writing(waits=False):
                found = prepared_graph(bundle)  # another process was faster
                if found is None and _is_due(bundle):
                    found = _kept(bundle)
    return found


def keep(bundle: Bundle, *, compares: bool = False) -> Path:
    """Keep a graph for good, if it was not kept before; returns it. Arguments and errors as `prepared.prepare`."""
    graph = prepare(bundle, compares=compares)
    _unmark(bundle)
    return graph


def discard(bundle: Bundle) -> bool:
    """Remove what was kept; returns whether there was anything."""
    _unmark(bundle)
    return forget(bundle)


def _is_due(bundle: Bundle) -> bool:
    """Whether a large bundle is to be kept now: there is room, and no attempt failed lately."""
    mark = _mark(bundle)
    was_kept = remove(mark.with_suffix(""))  # and is not whole any more
    if not was_kept and mark.exists() and time.time() - mark.stat().st_mtime < PAUSE:
        return False
    _remove_unused(mark.parent)
    return shutil.disk_usage(mark.parent).free >= _ROOM * _size(bundle)


def _kept(bundle: Bundle) -> Path | None:
    mark = _mark(bundle)
    mark.touch()
    _logger.info("%s: keeping the graph as it is packed, in %s, for later openings", bundle.root, mark.parent)
    try:
        bundle.verify_graph()
        return make(bundle)
    except BundleIntegrityError:
        _unmark(bundle)
        raise
    except (OSError, PrefixRuntimeError) as error:
        _logger.warning(
            "%s: its graph could not be kept, and is packed at every opening: %s; it is tried again tomorrow, and by "
            "prefix-runtime prepare at once",
            bundle.root,
            error,
        )
        return None
    except BaseException:
        _unmark(bundle)  # the next opening tries again
        raise


def _remove_unused(folder: Path) -> None:
    for mark in folder.glob("*.kept"):
        with suppress(OSError):  # another process has removed it
            if time.time() - mark.stat().st_mtime > UNUSED:
                remove(mark.with_suffix(""))
                mark.unlink()


def _mark(bundle: Bundle) -> Path:
    """Of a bundle that was kept by itself, or was to be."""
    return provider_folder(bundle, "cpu").with_suffix(".kept")


def _unmark(bundle: Bundle) -> None:
    with suppress(OSError):
        _mark(bundle).unlink()


def _touch_if_there(mark: Path) -> None:
    if mark.exists():
        mark.touch()


def _size(bundle: Bundle) -> int:
    return sum(entry.size for entry in bundle.manifest.files.values())
