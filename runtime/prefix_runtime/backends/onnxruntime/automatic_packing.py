"""Which graphs are packed: those asked for, and large ones automatically.

Packing takes seconds from about a gigabyte on. So the first opening of a bundle that large keeps a packed graph, which
takes several times as long, once. Beside a graph packed automatically lies a mark, which each opening touches. A mark
alone is of an attempt that failed, or over which a process was killed. A bundle of 4 bits packs fast, and its steps are
slower from a packed graph.
"""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.errors import BundleIntegrityError, PrefixRuntimeError

from .packed_graphs import forget, make, pack_graph, packed_graph, provider_folder, remove, writing

LARGE = 1 << 30
"""Bytes of a bundle without its prefixes, nearly all weights, from which on it is packed for seconds."""
PAUSE = 24 * 3600.0
"""Seconds after which it is tried again where it failed, or a process was killed over it."""
UNUSED = 30 * 24 * 3600.0
"""Seconds after which a graph that was packed automatically, and not opened since, makes room for another."""
_ROOM = 4
"""Times the bundle's size that must be free: a packed graph takes twice as much, half of the free disk."""

_logger = logging.getLogger("prefix_runtime")


def find_or_pack(bundle: Bundle, packs: bool | None = None) -> Path | None:
    """A bundle's packed graph for the CPU, packed now if it is due; None if there is none.

    Args:
        bundle: whose graph.
        packs: pack it first, for good; None packs it if it is large, and says what goes wrong in the log alone; False
            never does.

    Raises:
        BundleIntegrityError: the graph that is to be packed is not the one that the manifest names.
        ProviderError, OSError: as `pack_graph`, where it is asked for.
    """
    if packs:
        return pack_for_good(bundle)
    packed = packed_graph(bundle)
    with suppress(OSError):  # another process is at it, or the folder cannot be had, or is not to be written
        if packed is not None:
            _touch_if_there(_mark(bundle))
        elif packs is None and _size(bundle) >= LARGE and bundle.manifest.precision != "int4":
            with writing(waits=False):
                packed = packed_graph(bundle)  # another process was faster
                if packed is None and _is_due(bundle):
                    packed = _packed(bundle)
    return packed


def pack_for_good(bundle: Bundle, *, compares: bool = False) -> Path:
    """Pack a graph for good, if it was not packed before; returns it. Arguments and errors as `pack_graph`."""
    graph = pack_graph(bundle, compares=compares)
    _unmark(bundle)
    return graph


def discard_packed(bundle: Bundle) -> bool:
    """Remove a packed graph; returns whether there was one."""
    _unmark(bundle)
    return forget(bundle)


def _is_due(bundle: Bundle) -> bool:
    """Whether a large bundle is to be packed now: there is room, and no attempt failed lately."""
    mark = _mark(bundle)
    was_kept = remove(mark.with_suffix(""))  # and is not whole any more
    if not was_kept and mark.exists() and time.time() - mark.stat().st_mtime < PAUSE:
        return False
    _remove_unused(mark.parent)
    return shutil.disk_usage(mark.parent).free >= _ROOM * _size(bundle)


def _packed(bundle: Bundle) -> Path | None:
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
    """Of a bundle that was packed automatically, or was to be."""
    return provider_folder(bundle, "cpu").with_suffix(".kept")


def _unmark(bundle: Bundle) -> None:
    with suppress(OSError):
        _mark(bundle).unlink()


def _touch_if_there(mark: Path) -> None:
    if mark.exists():
        mark.touch()


def _size(bundle: Bundle) -> int:
    return sum(entry.size for entry in bundle.manifest.files.values())
