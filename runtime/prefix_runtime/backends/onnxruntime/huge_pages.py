"""The pages of memory that weights lie on: huge ones, and those of a mapped file only while they are needed.

A decode step reads every weight once. Memory comes in pages, of 4 KiB unless larger ones are asked for, and finding
where each begins takes 3 % of a step of GPT-2-medium, at 4 bits up to 12 (an AMD EPYC; `examples/compare/pairs.py
product-int8 product-int8-4k`, and so on).
onnxruntime 1.32 asks for none, so the system is asked here, for what a session allocates while it is opened. That is
advice: no content changes, and where the system has no huge pages, or is told to give none, nothing happens.

Source: madvise(2), proc(5) and Documentation/admin-guide/mm/transhuge.rst of Linux 6.18; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_MAPS, _SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
# Of madvise(2): no use of the pages is near; huge ones are wanted; and at once (Linux 6.1; else as it finds time).
_DONT_NEED, _HUGE, _COLLAPSE = 4, 14, 25
_WRITTEN = ("Anonymous:", "Swap:")
"""What is counted in /proc/self/smaps of a file's private mapping where it was written to."""
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)")

Span = tuple[int, int]
"""Addresses: the first, and the one behind the last."""


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Have what is allocated meanwhile, in pieces large enough, moved onto huge pages, by a thread, afterwards."""
    size = _huge_page_size()
    if size is None:
        yield
        return
    before = _private_spans()
    yield
    spans = list(_whole_pages(_difference(_private_spans(), before), size))
    if spans:
        with suppress(RuntimeError):  # no more threads are to be had: the pages stay as they are
            threading.Thread(target=_move, args=(spans,), name="prefix-runtime-pages", daemon=True).start()


@contextmanager
def opening() -> Iterator[None]:
    """Around all that maps a file of weights and may unmap it again: a session that is opened."""
    this = object()
    try:
        with _openings.lock:
            _openings.begun += 1
            _openings.under_way.add(this)
        yield
    finally:
        _openings.under_way.discard(this)  # in one step, that no interrupt divides


@contextmanager
def letting_go(path: Path) -> Iterator[None]:
    """Take the pages of a file that one `opening` in the block maps out of memory; what is used comes again.

    onnxruntime maps a file of weights, packs most of them anew, and keeps the mapping for the others as long as the
    session lives, which the block has to outlive. Pages that were written to stay: they are no longer the file's.
    Of other mappings of the file nothing is known: they may be unmapped, and their addresses be somebody else's, before
    the system is told what to do with them. So those that were there before are left alone, and all are where another
    opening was under way meanwhile.
    """
    madvise, path = _madvise(), path.resolve()
    if madvise is None:
        yield
        return
    with _openings.lock:
        begun, is_alone = _openings.begun, not _openings.under_way
        before = _spans_of(path)
    yield
    with _openings.lock:
        if is_alone and _openings.begun == begun + 1:
            for start, end in _difference(_spans_of(path, unwritten=True), before):
                madvise(start, end - start, _DONT_NEED)


class _Openings:
    """Of this process: how many were begun, and how many are under way."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.begun = 0
        self.under_way: set[object] = set()


_openings = _Openings()


def _move(spans: Sequence[Span]) -> None:
    madvise = _madvise()
    assert madvise is not None
    for start, end in spans:
        # What has been freed by now is refused, and what has been taken since is as well off.
        madvise(start, end - start, _HUGE)
        madvise(start, end - start, _COLLAPSE)


def _huge_page_size() -> int | None:
    """Bytes of a huge page; None where there are to be none."""
    try:
        allowed = (_SETTINGS / "enabled").read_text(encoding="ascii")
        size = int((_SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):  # another system, or a container that hides it
        return None
    return None if "[never]" in allowed or _madvise() is None else size


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    called: Callable[[int, int, int], int] = function
    return called


def _private_spans() -> list[Span]:
    """Memory that this process has allocated: of no file, written and read, and no stack."""
    return [
        (int(start, 16), int(end, 16))
        for start, end, permissions, inode, name in _mappings(_lines(_MAPS))
        if permissions == "rw-p" and inode == "0" and not name.startswith("[stack")
    ]


def _spans_of(path: Path, *, unwritten: bool = False) -> list[Span]:
    """Where a file is mapped, in order; where it was not written to since."""
    spans: list[Span] = []
    is_wanted = False
    for line in _lines(_SMAPS if unwritten else _MAPS):
        for start, end, _, _, name in _mappings([line]):
            is_wanted = name == str(path)
            if is_wanted:
                spans.append((int(start, 16), int(end, 16)))
        if is_wanted and line.startswith(_WRITTEN) and line.split()[1] != "0":
            spans.pop()
            is_wanted = False
    return spans


def _mappings(lines: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """First and last address, permissions, inode and name of each mapping among some lines."""
    return (match.groups() for match in map(_MAPPING.fullmatch, lines) if match)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # /proc is not there
        return []


def _difference(spans: Iterable[Span], others: Sequence[Span]) -> Iterator[Span]:
    """What of some spans is in none of others, which are in order."""
    for start, end in spans:
        first = start
        for other, behind in others:
            if behind <= first or other >= end:
                continue
            if other > first:
                yield first, other
            first = behind
        if first < end:
            yield first, end


def _whole_pages(spans: Iterable[Span], size: int) -> Iterator[Span]:
    """The part of each span that is whole pages of a size."""
    for start, end in spans:
        first, last = -(-start // size) * size, end // size * size
        if first < last:
            yield first, last
