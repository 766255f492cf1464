"""Graphs that are kept as onnxruntime opened them: used where they fit, never for another bundle or machine."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import prefix_runtime
from prefix_runtime import Bundle, BundleIntegrityError, Cuda, ProviderError, RequestError, machine, private
from prefix_runtime.backends.onnxruntime import packed_graphs
from prefix_runtime.backends.onnxruntime.packed_graphs import cache_folder, forget, pack_graph, packed_graph
from prefix_runtime.bundle.manifest import FileEntry
from prefix_runtime.cli.main import main

IDS = [5, 6, 7, 260, 12]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFIX_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["fp32", "int8"])
def opened(workshop, request):
    return Bundle.open(workshop.bundle(precision=request.param))


def logits(bundle, task="p20"):
    return prefix_runtime.load(bundle.root, threads=1).logits(IDS, task)


def test_the_kept_graph_answers_as_the_bundles_own(opened):
    before = logits(opened)
    graph = pack_graph(opened)
    assert packed_graph(opened) == graph
    np.testing.assert_array_equal(logits(opened), before)


def test_the_kept_graph_is_the_one_that_is_opened(opened, opened_paths):
    graph = pack_graph(opened)
    logits(opened)
    assert opened_paths == [graph]


def test_it_is_made_once(opened, monkeypatch):
    graph = pack_graph(opened)
    monkeypatch.setattr(packed_graphs, "save_opened", lambda *_: pytest.fail("made again"))
    assert pack_graph(opened) == graph


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [(packed_graphs, "onnxruntime_version", "0.0"), (packed_graphs, "processor_features", "another: avx")],
)
def test_another_onnxruntime_or_processor_does_not_find_it(opened, monkeypatch, module, name, value):
    pack_graph(opened)
    monkeypatch.setattr(module, name, lambda: value)
    assert packed_graph(opened) is None


def test_another_bundle_does_not_find_it(workshop):
    pack_graph(Bundle.open(workshop.bundle(precision="int8")))
    assert packed_graph(Bundle.open(workshop.bundle(precision="int4"))) is None


def test_files_count_whatever_their_names(opened):
    def with_weights(sha256):
        files = {name: FileEntry(name, 1, sha256) for name in ("graph.bin", "weights.bin")}
        return Bundle(opened.root, replace(opened.manifest, graph="graph.bin", files=files))

    assert packed_graphs._folder(with_weights("0" * 64), "cpu") != packed_graphs._folder(with_weights("1" * 64), "cpu")


def test_a_bundle_that_is_not_what_it_says_is_not_kept(bundle, cache):
    data = bundle / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=r"model\.onnx\.data: expected SHA-256"):
        pack_graph(Bundle.open(bundle))
    assert not cache.exists()


@pytest.mark.parametrize(
    ("error", "free", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 0, "disk full; make room"),
        (
            "cannot write to STAGING",
            0,
            "prepared: expected room for twice .*, found the disk full; make room, or name ",
        ),
        ("cannot write to STAGING", 1 << 30, "prepared: expected room for .*, found that it cannot be written; make "),
        ("cannot open the graph", 0, "^cannot open the graph$"),
    ],
)
def test_nothing_half_written_is_left_behind(opened, cache, monkeypatch, error, free, expected):
    def full(_path, target, _provider):
        target.write_bytes(b"half of it")
        raise error if isinstance(error, OSError) else ProviderError(error.replace("STAGING", str(target)))

    monkeypatch.setattr(packed_graphs, "save_opened", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(ProviderError if error == "cannot open the graph" else OSError, match=expected):
        pack_graph(opened)
    assert not list((cache / "prepared").iterdir())
    assert packed_graph(opened) is None


def test_a_process_that_comes_second_takes_what_the_first_kept(opened, monkeypatch):
    verify = Bundle.verify

    def overtaken(bundle):
        monkeypatch.setattr(Bundle, "verify", verify)
        pack_graph(opened)
        monkeypatch.setattr(packed_graphs, "save_opened", lambda *_: pytest.fail("made again"))
        return verify(bundle)

    monkeypatch.setattr(Bundle, "verify", overtaken)
    assert pack_graph(opened) == packed_graph(opened)


def test_processes_that_prepare_at_once_make_one_graph(opened, cache):
    command = [sys.executable, "-m", "prefix_runtime", "prepare", str(opened.root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(4)]
    said = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4, said
    assert len(said) == 1
    assert list((cache / "prepared").iterdir()) == [packed_graph(opened).parent]


def test_what_a_killed_process_left_goes_with_the_next_graph_or_with_what_is_removed(opened, cache):
    def leave():
        partial = cache / "prepared" / ".0123.abcd.partial"
        partial.mkdir(parents=True)
        (partial / "model.onnx.data").write_bytes(b"half of it")
        return partial

    partial = leave()
    assert forget(opened)
    assert not partial.exists()
    partial = leave()
    pack_graph(opened)
    assert not partial.exists()


@pytest.mark.parametrize("name", [".0123.abcd.partial", None], ids=["a leftover", "the graph"])
@pytest.mark.parametrize("stands", ["a file", "a link", "a link to nothing"])
def test_what_stands_where_a_folder_would_be_is_removed(opened, cache, tmp_path, name, stands):
    path = packed_graphs.provider_folder(opened, "cpu") if name is None else cache / "prepared" / name
    path.parent.mkdir(parents=True)
    mine = tmp_path / "mine"
    if stands != "a link to nothing":
        mine.mkdir()
    (path.write_text if stands == "a file" else path.symlink_to)(str(mine))
    graph = pack_graph(opened)
    assert packed_graph(opened) == graph
    assert list((cache / "prepared").iterdir()) == [graph.parent]
    assert mine.exists() == (stands != "a link to nothing")


def test_a_folder_that_was_in_an_archive_is_whole(opened):
    graph = pack_graph(opened)
    for path in graph.parent.iterdir():
        second = int(path.stat().st_mtime)
        os.utime(path, (second, second))
    assert packed_graph(opened) == graph
    os.utime(graph, (second - 1, second - 1))
    assert packed_graph(opened) is None


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "kept.json"])
@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"half"), zero])
def test_a_damaged_graph_is_not_opened_and_made_anew(opened, name, spoil):
    graph = pack_graph(opened)
    spoil(graph.with_name(name))
    assert packed_graph(opened) is None
    assert logits(opened).shape == (len(IDS), 384)
    assert pack_graph(opened) == graph
    assert packed_graph(opened) == graph


def test_an_engine_that_prepares_keeps_the_graph_once_and_opens_it(opened, opened_paths, monkeypatch):
    first = prefix_runtime.load(opened.root, threads=1, prepare=True)
    kept = packed_graph(opened)
    monkeypatch.setattr(packed_graphs, "save_opened", lambda *_: pytest.fail("made again"))
    again = prefix_runtime.load(opened.root, threads=1, prepare=True)
    assert opened_paths == [kept, kept]
    forget(opened)
    before = logits(opened)
    for engine in (first, again):
        np.testing.assert_array_equal(engine.logits(IDS, "p20"), before)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"verify": True}, "verify, which opens the bundle's own graph"),
        ({"provider": "cuda"}, "provider 'cuda'"),
        ({"provider": Cuda()}, r"provider Cuda\(device=0"),
        ({"provider": "tensorrt"}, "provider 'tensorrt'"),
        ({"provider": "tensorrt-engine"}, "provider 'tensorrt-engine'"),
    ],
)
def test_an_engine_that_would_not_open_what_it_keeps_keeps_nothing(workshop, cache, options, found):
    bundle = workshop.bundle(target="portable")
    with pytest.raises(RequestError, match=rf"prepare: expected provider 'cpu' without verify, found {found}"):
        prefix_runtime.load(bundle, prepare=True, **options)
    assert not cache.exists()


@pytest.mark.parametrize("wrong", ["yes", 1, 0, ""])
def test_what_is_neither_true_nor_false_is_refused(bundle, wrong):
    with pytest.raises(RequestError, match=rf"^prepare: expected True, False or None, found {wrong!r}$"):
        prefix_runtime.load(bundle, prepare=wrong)


def test_an_engine_that_cannot_keep_the_graph_says_so(opened, cache):
    cache.write_text("a file where the folder would be")
    with pytest.raises(OSError, match=rf"{cache}.*: expected a folder to keep graphs in.*PREFIX_RUNTIME_CACHE"):
        prefix_runtime.load(opened.root, prepare=True)
    assert prefix_runtime.load(opened.root, threads=1).logits(IDS).shape == (len(IDS), 384)


def test_who_asks_for_verification_gets_the_bundles_own_graph(opened, opened_paths):
    pack_graph(opened)
    prefix_runtime.load(opened.root, verify=True)
    assert opened_paths == [opened.graph_path]


def test_a_kept_graph_that_does_not_open_is_passed_over(opened):
    graph = pack_graph(opened)
    before = graph.stat()
    graph.write_bytes(bytes(before.st_size))
    os.utime(graph, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert packed_graph(opened) == graph, "size and time tell nothing"
    assert logits(opened).shape == (len(IDS), 384)


def test_a_process_that_is_terminated_leaves_nothing_behind(opened, cache, monkeypatch):
    def terminated(_path, target, _provider):
        target.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(packed_graphs, "save_opened", terminated)
    assert CliRunner().invoke(main, ["prepare", str(opened.root)]).exit_code == 128 + signal.SIGTERM
    assert not list((cache / "prepared").iterdir())


class TestOthers:
    """A folder that several users share: nobody else's graph is opened, and no link is followed."""

    PLACES = ("", "prepared", "prepared/KEY", "prepared/KEY/model.onnx", "prepared/KEY/model.onnx.data")

    @pytest.fixture
    def give_away(self, monkeypatch):
        """Makes a file or folder another user's."""

        def give(path):
            if os.geteuid() == 0:
                os.chown(path, 65534, -1)
            else:
                monkeypatch.setattr(private.os, "geteuid", lambda: 65534)

        return give

    @pytest.fixture
    def place(self, cache, opened):
        def found(name):
            return cache / name.replace("KEY", packed_graphs._folder(opened, "cpu").name)

        return found

    def refused(self, opened, caplog, paths):
        """The bundle's own graph is opened, and why is said in one line."""
        caplog.clear()
        assert packed_graph(opened) is None
        paths.clear()
        assert logits(opened).shape == (len(IDS), 384)
        assert paths == [opened.graph_path]
        lines = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
        assert len(lines) == 1
        return lines.pop()

    @pytest.mark.parametrize("umask", [0, 0o002, 0o077], ids=oct)
    def test_what_is_kept_is_the_users_alone_whatever_the_umask(self, opened, cache, umask):
        before = os.umask(umask)
        try:
            graph = pack_graph(opened)
        finally:
            os.umask(before)
        assert packed_graph(opened) == graph
        folders = [cache, cache / "prepared", graph.parent]
        assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
        assert {path.stat().st_mode & 0o777 for path in [*graph.parent.iterdir(), cache / "prepared.lock"]} == {0o600}

    @pytest.mark.parametrize("name", PLACES)
    @pytest.mark.parametrize("mode", [0o020, 0o002], ids=["group", "all"])
    def test_what_others_may_write_to_is_not_opened(self, opened, place, caplog, opened_paths, name, mode):
        pack_graph(opened)
        path = place(name)
        path.chmod(path.stat().st_mode | mode)
        line = self.refused(opened, caplog, opened_paths)
        assert line.startswith(f"{path}: expected a ")
        assert f"found mode {path.stat().st_mode & 0o777:04o}; remove it" in line

    @pytest.mark.parametrize("name", PLACES)
    def test_what_is_another_users_is_not_opened(self, opened, place, caplog, opened_paths, give_away, name):
        pack_graph(opened)
        give_away(place(name))
        assert "found one of user " in self.refused(opened, caplog, opened_paths)

    @pytest.mark.parametrize("name", PLACES)
    def test_what_is_a_link_is_not_followed(self, opened, place, caplog, opened_paths, tmp_path, name):
        pack_graph(opened)
        target = place(name).rename(tmp_path / "elsewhere")
        place(name).symlink_to(target)
        assert f"{place(name)}: expected a " in self.refused(opened, caplog, opened_paths)

    @pytest.mark.parametrize("name", ["", "prepared"])
    def test_nothing_is_kept_where_others_may_write(self, opened, place, name):
        pack_graph(opened)
        place(name).chmod(0o777)
        for pack in (pack_graph, lambda opened: prefix_runtime.load(opened.root, prepare=True)):
            with pytest.raises(OSError, match=f"^{place(name)}: expected a folder of this user's .* found mode 0777; "):
                pack(opened)
        refused = CliRunner().invoke(main, ["prepare", str(opened.root)])
        assert (refused.exit_code, refused.output.count("\n")) == (1, 1)

    def test_a_lock_that_is_a_link_is_not_followed(self, opened, cache, tmp_path):
        cache.mkdir(mode=0o700)
        (cache / "prepared.lock").symlink_to(tmp_path / "mine")
        with pytest.raises(OSError, match=f"^{cache}/prepared.lock: expected a file to write to, found none: "):
            pack_graph(opened)
        assert not (tmp_path / "mine").exists()

    def test_a_lock_of_another_user_is_refused(self, opened, cache, give_away):
        pack_graph(opened)
        give_away(cache / "prepared.lock")
        with pytest.raises(OSError, match=r"expected a (file|folder) of this user's .* found one of user "):
            forget(opened)


def test_what_was_replaced_by_a_file_of_the_same_size_and_time_is_found_by_prepare(opened, monkeypatch):
    graph = pack_graph(opened)
    data = graph.with_name("model.onnx.data")
    before, whole = data.stat(), data.read_bytes()
    data.write_bytes(bytes(before.st_size))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert CliRunner().invoke(main, ["prepare", str(opened.root)]).exit_code == 0
    assert data.read_bytes() == whole
    monkeypatch.setattr(packed_graphs, "save_opened", lambda *_: pytest.fail("made again"))
    assert CliRunner().invoke(main, ["prepare", str(opened.root)]).exit_code == 0


@pytest.mark.parametrize("how", ["replaced", "written to"])
def test_a_bundle_that_is_changed_between_hashing_and_keeping_is_not_kept(bundle, cache, monkeypatch, how):
    weights, save = bundle / "model.onnx.data", packed_graphs.save_opened

    def change(*arguments):
        other = weights.with_name("other")
        other.write_bytes(bytes(weights.stat().st_size))
        if how == "replaced":
            other.replace(weights)
        else:
            weights.write_bytes(other.read_bytes())
        save(*arguments)

    monkeypatch.setattr(packed_graphs, "save_opened", change)
    opened = Bundle.open(bundle)
    with pytest.raises(BundleIntegrityError, match=f"^{weights}: expected the file that was verified"):
        pack_graph(opened)
    assert packed_graph(opened) is None
    assert not list((cache / "prepared").iterdir())


def test_it_may_be_removed(opened):
    pack_graph(opened)
    assert forget(opened)
    assert packed_graph(opened) is None
    assert not forget(opened)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PREFIX_RUNTIME_CACHE": "/here", "XDG_CACHE_HOME": "/there"}, "/here"),
        ({"PREFIX_RUNTIME_CACHE": "", "XDG_CACHE_HOME": "/there"}, "/there/prefix-runtime"),
        ({"PREFIX_RUNTIME_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/prefix-runtime"),
    ],
)
def test_the_folder_is_the_users(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected


@pytest.mark.parametrize("folder", ["~nobody-of-this-name/here", "/" + 5000 * "x", "/dev/null/here"])
def test_a_folder_that_cannot_be_stops_no_engine(bundle, monkeypatch, folder):
    monkeypatch.setenv("PREFIX_RUNTIME_CACHE", folder)
    assert logits(Bundle.open(bundle)).shape == (len(IDS), 384)
    refused = CliRunner().invoke(main, ["prepare", str(bundle)])
    assert refused.exit_code == 1
    assert refused.output.startswith("Error: ")
    assert refused.output.count("\n") == 1


def test_the_command_line_prepares_and_removes(opened, cache):
    run = CliRunner().invoke
    made = run(main, ["prepare", str(opened.root)])
    assert made.exit_code == 0
    assert made.output.startswith(f"{cache}/prepared/")
    assert made.output.endswith(" MB\n")
    assert run(main, ["prepare", "--remove", str(opened.root)]).output == f"removed the packed copy of {opened.root}\n"
    assert run(main, ["prepare", "--remove", str(opened.root)]).output == "there is no packed copy\n"


def test_features_name_the_processor():
    features = machine.processor_features()
    assert features.startswith(machine.processor_name())
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert set(flags[1].split()) <= set(features.split())
