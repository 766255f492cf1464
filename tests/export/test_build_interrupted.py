"""A build that is stopped from outside: whole or not at all."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time

import pytest

from prefix_export.build import BuildRequest, build
from prefix_export.build import plan as export


@pytest.fixture
def place(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def start(model, adapter, place, limit=resource.RLIM_INFINITY):
    def prepare():
        # A shell's background job ignores Ctrl-C, what nohup starts the end of a terminal, and so would all they start.
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ["--model", model, "--prefix", f"task={adapter}", "--output", place / "out", "--no-verify"]
    return subprocess.Popen(
        [sys.executable, "-m", "prefix_export", "build", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,  # noqa: PLW1509  # there is no other way to limit files
    )


def stop_in_the_middle(process, place, number):
    """Send a signal as soon as the bundle is being written; the exit status and the output."""
    deadline = time.monotonic() + 120
    while not list(place.glob(".out.*.partial")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    return process.returncode, output, error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_build_that_is_asked_to_end_says_so_in_one_line_and_leaves_nothing_behind(gpt2, gpt2_adapter, place, number):
    process = start(gpt2, gpt2_adapter, place)
    assert stop_in_the_middle(process, place, number) == (128 + number, "", "Aborted!\n")
    assert not list(place.iterdir())


def test_a_build_that_is_killed_leaves_no_bundle_and_does_not_stand_in_the_way(gpt2, gpt2_adapter, place, monkeypatch):
    assert stop_in_the_middle(start(gpt2, gpt2_adapter, place), place, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (place / "out").exists()
    assert [path.suffix for path in place.iterdir()] == [".partial"]

    def written(_decoder, _positions, path, **_):
        path.write_bytes(b"\x08\x0a")  # of an ONNX model its version alone
        return 1

    monkeypatch.setattr(export, "export_graph", written)
    result = build(BuildRequest(str(gpt2), {"task": gpt2_adapter}, place / "out", verify=False))
    assert result.bundle.tasks == ("task",)
    result.bundle.verify()


def test_a_disk_that_fills_up_ends_the_build_with_one_line_and_leaves_nothing_behind(gpt2, gpt2_adapter, place):
    # The graph's weights are larger than this; so every write beyond fails as on a full disk.
    process = start(gpt2, gpt2_adapter, place, limit=300_000)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output == ""
    assert error == (
        f"Error: {place}/out/model.onnx: the file would be larger than the file system or a limit (ulimit -f) allows\n"
    )
    assert not list(place.iterdir())
