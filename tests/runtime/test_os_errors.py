"""Errors of the operating system: the path that the user gave, what is wrong, what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from prefix_runtime import files
from prefix_runtime.bundle.staging import staged
from prefix_runtime.cli import main as cli
from prefix_runtime.files import check_room, partial_name, shown_size, write_file_atomically
from prefix_runtime.os_errors import described, write_error


@pytest.fixture
def disk(monkeypatch):
    """A disk of a terabyte with so many bytes free."""

    def holds(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, free=free))

    return holds


def plain(number, path="/data/out"):
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "permission denied; change its permissions, or name another place"),
        (errno.EPERM, "permission denied; change its permissions, or name another place"),
        (errno.EROFS, "the file system is read-only; write elsewhere"),
        (errno.ENAMETOOLONG, "the name is too long; shorten the path"),
        (errno.EISDIR, "expected a file, found a folder"),
        (errno.ENOTDIR, "expected a folder, found a file in its path"),
        (errno.ENOENT, "no such file or folder"),
        (errno.EMFILE, "too many open files; raise the limit with: ulimit -n"),
        (errno.EDQUOT, "the disk quota is used up; remove files, or write elsewhere"),
        (errno.EFBIG, "the file would be larger than the file system or a limit (ulimit -f) allows"),
        (errno.EBUSY, os.strerror(errno.EBUSY).lower()),
    ],
)
def test_each_says_what_is_wrong_and_what_to_do(number, said):
    assert described(plain(number)) == f"/data/out: {said}"


def test_a_path_that_is_not_known_is_left_out():
    assert described(OSError(errno.EMFILE, os.strerror(errno.EMFILE))).startswith("too many open files;")
    assert described(OSError(errno.EIO, os.strerror(errno.EIO), 7)).startswith("the device cannot be read")
    assert described(OSError(errno.EACCES, os.strerror(errno.EACCES), b"/data/out")).startswith("/data/out: permission")


def test_an_error_that_has_a_sentence_of_its_own_keeps_it():
    assert described(OSError("PREFIX_RUNTIME_CACHE: expected a folder")) == "PREFIX_RUNTIME_CACHE: expected a folder"
    assert described(OSError(errno.EIO, "cannot be written: why", "/data/out")) == "/data/out: cannot be written: why"


def test_a_full_disk_is_told_with_its_room(disk):
    disk(1_600_000)
    assert described(plain(errno.ENOSPC)) == "/data/out: disk full: 1.6 MB free; make room, or write elsewhere"
    disk(81 * 10**9)
    assert "takes no more, although 81.0 GB are free" in described(plain(errno.ENOSPC))


def test_a_write_that_has_no_room_is_refused_before_it_begins(tmp_path, disk):
    disk(1_600_000)
    with pytest.raises(OSError, match="disk full") as caught:
        write_file_atomically(tmp_path / "file", bytes(2_000_000))
    assert caught.value.errno == errno.ENOSPC
    assert described(caught.value) == (
        f"{tmp_path}/file: disk full: needs 2.0 MB, 1.6 MB free; make room, or write elsewhere"
    )
    assert not list(tmp_path.iterdir())
    check_room(tmp_path / "file", 1_600_000)


def test_a_file_system_that_does_not_tell_its_room_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    write_file_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/.out.0a1b2c3d.partial/file"), errno.EDQUOT),
        (Exception("No space left on device (os error 28)"), errno.ENOSPC),  # tokenizers
        (OSError("262144 requested and 4096 written"), errno.ENOSPC),  # numpy's tofile
        (ValueError("message is too large"), errno.EIO),
    ],
)
def test_what_a_library_raises_when_it_cannot_write_is_the_systems_error_of_the_users_path(tmp_path, error, number):
    found = write_error(tmp_path / "out", error)
    assert (type(found).__mro__[-4:-2], found.errno) == ((OSError, Exception), number)
    assert found.filename == str(tmp_path / "out")
    assert "None" not in described(found)


def test_a_disk_without_room_explains_an_error_that_explains_nothing(tmp_path, disk):
    disk(5000)
    found = write_error(tmp_path / "out", ValueError("failed"))
    assert (found.errno, described(found)) == (
        errno.ENOSPC,
        f"{tmp_path}/out: disk full: 5.0 kB free; make room, or write elsewhere",
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("inside", [None, "", "model.onnx"], ids=["no path", "the folder", "a file"])
def test_a_staged_folder_is_told_by_the_name_that_it_is_to_have(tmp_path, number, inside):
    def write(folder):
        path = () if inside is None else (str(folder / inside),)
        raise OSError(number, os.strerror(number), *path)

    with pytest.raises(OSError, match=r".") as caught, staged(tmp_path / "out") as folder:
        write(folder)
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / "out" / (inside or ""))
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_place_keeps_its_path(tmp_path):
    with pytest.raises(PermissionError) as caught, staged(tmp_path / "out"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere")
    assert caught.value.filename == "/elsewhere"


def test_hidden_names_are_shown_as_those_that_they_stand_for(tmp_path):
    partial = partial_name(tmp_path / "my out")
    for text, shown in (
        (f"{partial}", f"{tmp_path}/my out"),
        (f"{partial}/model.onnx: damaged", f"{tmp_path}/my out/model.onnx: damaged"),
        (f"cannot write '{partial}/x'", f"cannot write '{tmp_path}/my out/x'"),
        (f"cannot write {partial.name}", "cannot write my out"),
        ("a.b.partial", "a.b.partial"),
    ):
        assert files.without_partial_names(text) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 bytes"), (999, "999 bytes"), (1600, "1.6 kB"), (540e6, "540 MB"), (1.6e6, "1.6 MB"), (2.5e12, "2.5 TB")],
)
def test_sizes_are_shown_in_units_of_1000(size, shown):
    assert shown_size(size) == shown


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/data/b"), "/data/b: permission denied; change its"),
        (OSError(errno.EMFILE, "Too many open files"), "too many open files; raise the limit with: ulimit -n"),
        (MemoryError("Unable to allocate 4 GiB"), "out of memory: Unable to allocate 4 GiB"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory: [enforce fail]"),
    ],
)
def test_the_command_line_ends_with_the_sentence(shared_bundle, monkeypatch, error, said):
    def fail(_):
        raise error

    monkeypatch.setattr("prefix_runtime.bundle.folder.sha256_of_file", fail)
    result = CliRunner().invoke(cli.main, ["verify", str(shared_bundle)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(rf"Error: {re.escape(said)}.*\n", result.stderr)
