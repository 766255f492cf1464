"""Pages of memory: what is allocated in a block comes onto huge ones, a mapped file's are let go of, numbers stay."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import prefix_runtime
from prefix_runtime import Bundle
from prefix_runtime.backends.onnxruntime import huge_pages
from prefix_runtime.backends.onnxruntime.huge_pages import _difference, _whole_pages, letting_go, on_huge_pages, opening

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems are left alone")
SIZE = 16 << 20
IDS = [5, 6, 7, 260, 12]


def private_memory():
    """Private memory of this process' own, every page written to."""
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = np.arange(SIZE // mmap.PAGESIZE) % 251
    return memory


def mapped(path):
    """A file's bytes, mapped privately; they are unmapped with the array."""
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


def expected():
    content = np.zeros(SIZE, np.uint8)
    content[:: mmap.PAGESIZE] = np.arange(SIZE // mmap.PAGESIZE) % 251
    return content


def kibibytes(name, *, address=None, path=None):
    """A line of /proc/self/smaps, summed over the mappings that hold an address, or of a file; None without any."""
    found = None
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        place = re.match(r"([0-9a-f]+)-([0-9a-f]+) .*?(/.*)?\n", block)
        if not place:
            continue
        first, end = (int(bound, 16) for bound in place.groups()[:2])
        if place[3] == str(path) or (address is not None and first <= address < end):
            found = (found or 0) + int(re.search(rf"(?m)^{name}: +(\d+)", block)[1])
    return found


def settled():
    """Wait for the threads that move pages."""
    for thread in threading.enumerate():
        if thread.name == "prefix-runtime-pages":
            thread.join()


@linux
def test_what_is_allocated_meanwhile_comes_onto_huge_pages_and_stays_what_it_is():
    before = private_memory()
    with on_huge_pages():
        memory = private_memory()
    settled()
    found = {
        name: kibibytes("AnonHugePages", address=np.frombuffer(each, np.uint8).ctypes.data + SIZE // 2)
        for name, each in (("before", before), ("meanwhile", memory))
    }
    # What lies at the ends may be in pages that other memory has a part of.
    assert found["meanwhile"] >= (SIZE >> 10) - 4096 if huge_pages._huge_page_size() else found["meanwhile"] == 0
    np.testing.assert_array_equal(np.frombuffer(memory, np.uint8), expected())
    np.testing.assert_array_equal(np.frombuffer(before, np.uint8), expected())


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_where_huge_pages_are_not_to_be_nothing_is_asked(monkeypatch, tmp_path, setting):
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "_move", lambda spans: pytest.fail("pages are moved"))
    with on_huge_pages():
        memory = private_memory()
    settled()
    assert memory[0] == 0


def test_a_block_that_fails_moves_nothing(monkeypatch):
    monkeypatch.setattr(huge_pages, "_move", lambda spans: pytest.fail("pages are moved"))
    with pytest.raises(RuntimeError, match="no graph"), on_huge_pages():
        raise RuntimeError("no graph")


def test_without_a_thread_for_it_pages_stay_where_they_are(monkeypatch):
    def refuse(thread):  # noqa: ARG001  # called as Thread.start
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with on_huge_pages():
        memory = private_memory()
    np.testing.assert_array_equal(np.frombuffer(memory, np.uint8), expected())


@linux
def test_a_mapped_files_pages_are_let_go_of_and_come_again(tmp_path):
    path = tmp_path / "weights of a graph"
    path.write_bytes(expected().tobytes())
    with letting_go(path), opening():
        array = mapped(path)
        assert array.sum() > 0
        assert kibibytes("Rss", path=path) == SIZE >> 10
    assert kibibytes("Rss", path=path) == 0
    np.testing.assert_array_equal(array, expected())


@linux
@pytest.mark.parametrize("when", ["before", "meanwhile", "afterwards"])
def test_where_others_may_unmap_the_file_its_pages_stay(tmp_path, when):
    """As what was unmapped may be somebody's memory by the time that the system is told to empty it."""
    path = tmp_path / "weights"
    path.write_bytes(expected().tobytes())
    with ExitStack() as others:
        if when == "before":
            others.enter_context(opening())
        with letting_go(path), opening():
            array = mapped(path)
            assert array.sum() > 0
            if when == "meanwhile":
                others.enter_context(opening())
        if when == "afterwards":
            others.enter_context(opening())
    assert kibibytes("Rss", path=path) == (0 if when == "afterwards" else SIZE >> 10)


@linux
def test_what_was_mapped_before_stays(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(expected().tobytes())
    before = mapped(path)
    assert before.sum() > 0
    with letting_go(path), opening():
        pass
    assert kibibytes("Rss", path=path) == SIZE >> 10


@linux
def test_engines_are_opened_and_dropped_by_many_threads(workshop):
    """Whose mappings come and go while others let go of theirs."""
    code = """
import os, threading, prefix_runtime
found, start = [], threading.Barrier(6)
def run():
    start.wait()
    for _ in range(4):
        engine = prefix_runtime.load(os.environ["BUNDLE"], threads=1)
        found.append(engine.generate(token_ids=[5, 6, 7], max_new_tokens=8).token_ids)
threads = [threading.Thread(target=run) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 24 and len(set(found)) == 1, found
"""
    environment = os.environ | {"BUNDLE": str(workshop.bundle(precision="int8"))}
    for _ in range(5):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@linux
def test_what_was_written_to_a_mapped_file_stays(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    with letting_go(path), opening():
        array = mapped(path)
        array[SIZE // 2] = 7
    assert array[SIZE // 2] == 7


@linux
@pytest.mark.parametrize("options", [{}, {"precision": "int8"}, {"target": "portable"}])
def test_an_engine_answers_from_pages_that_were_let_go_of(workshop, tmp_path, options):
    # Of its own: what other engines in this process have mapped stays.
    bundle = Bundle.open(shutil.copytree(workshop.bundle(**options), tmp_path / "bundle"))
    data = bundle.graph_path.with_name("model.onnx.data")
    engine = prefix_runtime.load(bundle.root, threads=1)
    assert kibibytes("Rss", path=data) in (0, None)
    with Path("/proc/self/maps").open() as maps:
        spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(data))]
    first = engine.logits(IDS, "p20")
    for start, end in spans:
        huge_pages._madvise()(int(start, 16), int(end, 16) - int(start, 16), huge_pages._DONT_NEED)
    np.testing.assert_array_equal(engine.logits(IDS, "p20"), first)


@pytest.mark.parametrize(
    ("span", "others", "left"),
    [
        ((10, 20), [], [(10, 20)]),
        ((10, 20), [(10, 20)], []),
        ((10, 20), [(0, 30)], []),
        ((10, 20), [(0, 10), (20, 30)], [(10, 20)]),
        ((10, 20), [(5, 12)], [(12, 20)]),
        ((10, 20), [(18, 25)], [(10, 18)]),
        ((10, 20), [(12, 14), (16, 17)], [(10, 12), (14, 16), (17, 20)]),
    ],
)
def test_what_was_there_before_is_left_out(span, others, left):
    assert list(_difference([span], others)) == left


@pytest.mark.parametrize(
    ("span", "left"), [((0, 4096), [(0, 4096)]), ((1, 8193), [(4096, 8192)]), ((1, 8191), []), ((4096, 8191), [])]
)
def test_pages_are_whole(span, left):
    assert list(_whole_pages([span], 4096)) == left
