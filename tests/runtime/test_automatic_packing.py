"""Which graphs are kept without being asked for: large ones, where there is room."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
from click.testing import CliRunner

import prefix_runtime
from prefix_runtime import Bundle, BundleIntegrityError, ProviderError
from prefix_runtime.backends.onnxruntime import automatic_packing, packed_graphs
from prefix_runtime.backends.onnxruntime.automatic_packing import LARGE, PAUSE, UNUSED, find_or_pack
from prefix_runtime.backends.onnxruntime.packed_graphs import pack_graph, packed_graph, writing
from prefix_runtime.cli.main import main

IDS = [5, 6, 7]


class Usage(NamedTuple):
    """Of a disk, as `shutil.disk_usage` returns it."""

    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFIX_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


@pytest.fixture
def opened(bundle):
    return Bundle.open(bundle)


@pytest.fixture
def large(monkeypatch, opened):
    """A bundle that is large."""
    monkeypatch.setattr(automatic_packing, "LARGE", automatic_packing._size(opened))
    return opened


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def load(bundle, **options):
    return prefix_runtime.load(bundle.root, threads=1, **options)


def suffixes(cache):
    return sorted(path.suffix for path in cache.iterdir())


@pytest.fixture
def kept(large, cache):
    """One that was kept by itself."""
    load(large)
    assert suffixes(cache) == ["", ".kept"]
    return large


def test_a_large_bundle_is_kept_at_the_first_opening(large, cache, opened_paths):
    before = load(large, prepare=False).logits(IDS, "p20")
    assert not cache.exists()
    found = [load(large).logits(IDS, "p20") for _ in range(2)]
    graph = packed_graph(large)
    assert opened_paths == [large.graph_path, graph, graph]
    assert suffixes(cache) == ["", ".kept"]
    assert all((logits == before).all() for logits in found)


def test_the_command_line_says_that_it_keeps_one(large, cache):
    def generate():
        return CliRunner().invoke(main, ["generate", str(large.root), "--token-ids", "5,6", "--max-new-tokens", "1"])

    expected = f"{large.root}: keeping the graph as it is packed, in {cache}, for later openings\n"
    assert generate().stderr == expected
    assert generate().stderr == ""


def test_of_several_processes_one_keeps_it(large, monkeypatch, opened_paths):
    save, made = packed_graphs.save_opened, []

    def overtake(path, target, provider):
        made.append(path)
        load(large)  # while another one writes
        save(path, target, provider)

    monkeypatch.setattr(packed_graphs, "save_opened", overtake)
    load(large)
    assert made == [large.graph_path]
    assert opened_paths == [large.graph_path, packed_graph(large)]


def test_processes_that_open_it_at_once_keep_it_once_and_all_open(large, cache):
    code = """
import logging, os, prefix_runtime
from prefix_runtime.backends.onnxruntime import automatic_packing
automatic_packing.LARGE = 0
logging.basicConfig(level=logging.INFO, format="%(message)s")
prefix_runtime.load(os.environ["BUNDLE"], threads=1)
"""
    environment = os.environ | {"BUNDLE": str(large.root)}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert sum("keeping the graph" in each for each in said) == 1
    assert suffixes(cache) == ["", ".kept"]


def test_a_graph_that_another_process_has_just_kept_is_opened(kept, monkeypatch, opened_paths):
    graph, looked = packed_graph(kept), []

    def look(bundle):
        looked.append(bundle)
        return None if len(looked) == 1 else graph  # it came behind the first look

    monkeypatch.setattr(automatic_packing, "packed_graph", look)
    load(kept)
    assert opened_paths[-1] == graph == packed_graph(kept)


def test_who_opens_a_bundle_does_not_wait_for_who_keeps_another(large, cache, opened_paths):
    with writing():
        load(large)
    assert opened_paths == [large.graph_path]
    assert not list(cache.iterdir())


@pytest.mark.parametrize("options", [{"prepare": False}, {"verify": True}])
def test_who_wants_none_has_none_kept(large, cache, options):
    load(large, **options)
    assert not cache.exists()


def test_a_small_bundle_is_not_kept(opened, cache):
    assert automatic_packing._size(opened) < LARGE
    load(opened)
    assert not cache.exists()


def test_the_size_counts_graph_and_weights(opened):
    graph = opened.graph_path
    least = sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))
    assert least <= automatic_packing._size(opened) < least + 1_000_000


def test_where_there_is_little_room_none_is_kept_until_there_is(large, cache, monkeypatch):
    free = 4 * automatic_packing._size(large)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 1, free - 1))
    load(large)
    assert suffixes(cache) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
    load(large)
    assert suffixes(cache) == ["", ".kept"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] the disk takes no more"),
        (ProviderError("cannot write"), "cannot write; it"),
    ],
)
def test_what_goes_wrong_is_said_stops_no_engine_and_is_tried_again_a_day_later(
    large, cache, monkeypatch, caplog, error, said
):
    tried, save = [], packed_graphs.save_opened

    def fail(_path, target, _provider):
        tried.append(target)
        target.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(packed_graphs, "save_opened", fail)
    for _ in range(3):
        assert load(large).logits(IDS).shape == (len(IDS), 384)
    assert len(tried) == 1
    assert suffixes(cache) == [".kept"]
    (warning,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert warning.startswith(f"{large.root}: its graph could not be kept, and is packed at every opening: {said}")
    later, now = PAUSE + 1, time.time
    monkeypatch.setattr(time, "time", lambda: now() + later)
    load(large)
    assert len(tried) == 2
    monkeypatch.setattr(packed_graphs, "save_opened", save)
    later *= 2
    load(large)
    assert suffixes(cache) == ["", ".kept"]


@pytest.mark.parametrize("removed", [False, True], ids=["", "while another process removes the mark"])
@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit])
def test_who_is_interrupted_is_and_tries_again(large, cache, monkeypatch, how, removed):
    def interrupt(*_):
        for mark in cache.glob("*.kept") if removed else ():
            mark.unlink()
        raise how

    save = packed_graphs.save_opened
    monkeypatch.setattr(packed_graphs, "save_opened", interrupt)
    with pytest.raises(how):
        load(large)
    assert suffixes(cache) == []
    monkeypatch.setattr(packed_graphs, "save_opened", save)
    load(large)
    assert suffixes(cache) == ["", ".kept"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_process_that_is_killed_over_it_is_the_last_for_a_day_and_leaves_nothing_large(large, cache, number):
    code = """
import os, prefix_runtime
from prefix_runtime.backends.onnxruntime import automatic_packing, packed_graphs
automatic_packing.LARGE = 0
packed_graphs.save_opened = lambda path, target, _: (target.write_bytes(b"half of it"), os.kill(os.getpid(), NUMBER))
prefix_runtime.load(os.environ["BUNDLE"], threads=1)
""".replace("NUMBER", str(int(number)))
    environment = os.environ | {"BUNDLE": str(large.root)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -number
    assert suffixes(cache) == [".kept", ".partial"]
    for _ in range(2):
        load(large)
    assert suffixes(cache) == [".kept"]
    age(next(cache.glob("*.kept")), PAUSE + 1)
    load(large)
    assert suffixes(cache) == ["", ".kept"]
    load(large, prepare=True)
    assert suffixes(cache) == [""]


def test_a_graph_that_is_not_whole_any_more_is_kept_anew(kept, cache):
    graph = packed_graph(kept)
    graph.write_bytes(b"half of it")
    load(kept)
    assert packed_graph(kept) == graph
    assert suffixes(cache) == ["", ".kept"]


def test_a_bundle_of_4_bits_is_not_kept(workshop, cache, monkeypatch):
    monkeypatch.setattr(automatic_packing, "LARGE", 0)
    load(Bundle.open(workshop.bundle(precision="int4")))
    assert not cache.exists()


def test_a_graph_that_is_not_the_manifests_is_refused_and_not_kept(large, cache):
    weights = large.graph_path.with_name("model.onnx.data")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    for _ in range(2):
        with pytest.raises(BundleIntegrityError, match=r"model\.onnx\.data: expected SHA-256"):
            load(large)
    assert not list(cache.iterdir())


def test_a_kept_graph_that_cannot_be_opened_is_kept_anew(kept, opened_paths):
    graph = packed_graph(kept)
    status = graph.stat()
    graph.write_bytes(bytes(status.st_size))
    os.utime(graph, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert packed_graph(kept) == graph
    for _ in range(2):
        assert load(kept).logits(IDS).shape == (len(IDS), 384)
    assert opened_paths[-3:] == [graph, kept.graph_path, graph]


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_folder_that_is_not_to_be_written_stops_no_engine(kept, monkeypatch, is_kept):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    if not is_kept:
        automatic_packing.discard_packed(kept)
    monkeypatch.setattr("pathlib.Path.touch", refuse)
    assert load(kept).logits(IDS).shape == (len(IDS), 384)


def test_what_was_kept_by_itself_and_not_opened_for_long_makes_room(kept, workshop, monkeypatch):
    other = Bundle.open(workshop.bundle(precision="int8"))
    folder = packed_graph(kept).parent
    mark, usage = folder.with_suffix(".kept"), shutil.disk_usage
    age(mark, UNUSED - 60)
    load(kept)
    assert time.time() - mark.stat().st_mtime < 60
    monkeypatch.setattr(automatic_packing, "LARGE", 0)
    # There is room as soon as the first graph has gone.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0) if folder.exists() else usage(path))
    load(other)
    assert (packed_graph(kept) is None, packed_graph(other)) == (False, None)
    age(mark, UNUSED + 60)
    load(other)
    assert packed_graph(other) is not None
    assert not folder.exists()
    assert not mark.exists()


def test_a_mark_that_another_process_removes_stops_nobody(large, cache):
    cache.mkdir(parents=True)
    (cache / "gone.kept").symlink_to(cache / "nowhere")
    load(large)
    assert packed_graph(large) is not None


def test_what_was_asked_for_stays(kept, cache):
    load(kept, prepare=True)
    assert suffixes(cache) == [""]
    age(packed_graph(kept).parent, UNUSED + 60)
    automatic_packing._remove_unused(cache)
    assert packed_graph(kept) is not None


def test_what_was_removed_begins_anew(kept, cache):
    removed = CliRunner().invoke(main, ["prepare", "--remove", str(kept.root)])
    assert removed.output == f"removed the packed copy of {kept.root}\n"
    assert not list(cache.iterdir())
    load(kept)
    assert suffixes(cache) == ["", ".kept"]


def test_a_graph_kept_on_request_is_opened_whoever_asks(opened):
    graph = pack_graph(opened)
    assert [find_or_pack(opened, keeps) for keeps in (True, None, False)] == [graph, graph, graph]
