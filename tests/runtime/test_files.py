"""Files that are there whole or not at all: on a full disk, when the writer is killed, when two write at once."""

from __future__ import annotations

import errno
import hashlib
import signal
import threading

import pytest

from prefix_runtime.files import locked, partial_name, sha256_of_file, write_file_atomically

ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from prefix_runtime.files import write_file_atomically

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_file_atomically(Path(sys.argv[1]), b"n" * 5000)
except OSError as error:
    print(error.errno)
"""

KILLED_AT_A_SYNC = """
import os, signal, sys
from pathlib import Path
from prefix_runtime.files import write_file_atomically

syncs = []

def sync(descriptor):
    syncs.append(descriptor)
    if len(syncs) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = sync
write_file_atomically(Path(sys.argv[1]), b"new")
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


@pytest.mark.parametrize("content", [b"", b"new", bytes(range(256)) * 5000])
def test_a_file_gets_its_new_content(path, content):
    write_file_atomically(path, content)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_was_not_there_is_written(tmp_path):
    write_file_atomically(tmp_path / "new", b"content")
    assert (tmp_path / "new").read_bytes() == b"content"


def test_a_full_disk_leaves_the_old_content_and_nothing_else(path, python):
    run = python(ON_A_FULL_DISK, path)
    assert (run.stdout.split(), run.stderr) == ([str(errno.EFBIG)], "")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("sync", "content"), [(1, b"old"), (2, b"new")], ids=["file written", "file replaced"])
def test_a_kill_leaves_the_old_content_or_the_new(path, python, sync, content):
    assert python(KILLED_AT_A_SYNC, path, sync).returncode == -signal.SIGKILL
    assert path.read_bytes() == content
    assert all(other.name.startswith(".") for other in path.parent.iterdir() if other != path)


def test_the_content_is_synced_before_the_name_and_the_name_at_last(path, monkeypatch):
    seen = []
    monkeypatch.setattr("os.fsync", lambda _: seen.append(path.read_bytes()))
    write_file_atomically(path, b"new")
    assert seen == [b"old", b"new"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_content_and_nothing_else(path, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(type(error)):
        write_file_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_file_atomically(tmp_path / "folder", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_reader_never_sees_a_part(path):
    contents = [bytes([byte]) * 300_000 for byte in range(20)]
    path.write_bytes(contents[0])
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        write_file_atomically(path, content)
    done.set()
    reader.join()
    assert seen
    assert seen <= set(contents)


def test_partial_names_are_hidden_siblings_that_differ(path):
    names = {partial_name(path) for _ in range(50)}
    assert len(names) == 50
    assert {name.parent for name in names} == {path.parent}
    assert all(name.name.startswith(".file.") for name in names)


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_the_hash_is_that_of_hashlib(tmp_path, size):
    content = bytes(index % 251 for index in range(size))
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    entered = threading.Event()

    def enter():
        with locked(tmp_path):
            entered.set()

    other = threading.Thread(target=enter)
    with locked(tmp_path):
        other.start()
        assert not entered.wait(0.2)
    other.join()
    assert entered.is_set()


def test_who_does_not_wait_for_a_lock_is_told(tmp_path):
    path = tmp_path / "lock"
    with locked(path) as is_held, pytest.raises(BlockingIOError), locked(path, waits=False):
        pytest.fail("held twice")
    assert is_held
    with locked(path, waits=False):
        assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_freed_by_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) == []
