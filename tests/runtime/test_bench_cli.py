"""`bench` on the command line: what is printed and written agrees with the library; nothing is left half-written."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from prefix_runtime import files as files_module
from prefix_runtime.bench import bandwidth
from prefix_runtime.bench import run as bench_module
from prefix_runtime.bench.file import from_json
from prefix_runtime.bench.report.tables import as_text
from prefix_runtime.cli import bench as bench_cli
from prefix_runtime.cli.main import main

SMALL = ["--rounds", 1, "--new-tokens", 2, "--threads", 1, "--prompt-length", 4]
OUTPUTS = ("json", "csv", "html", "png")


@pytest.fixture(autouse=True)
def _little_to_read(monkeypatch):
    monkeypatch.setattr(bandwidth, "MOST_BYTES", 1 << 20)


@pytest.fixture
def cli():
    """Runs `bench` in this process."""
    return lambda *arguments: CliRunner().invoke(
        main, ["bench", *map(str, arguments)], prog_name="prefix-runtime", catch_exceptions=False
    )


@pytest.fixture
def refused(cli):
    """The one line that it ends with when the library refuses."""

    def line_of(*arguments):
        result = cli(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.count("\n") == 1
        return result.stderr

    return line_of


def test_every_output_is_of_the_same_report(cli, shared_bundle, tmp_path):
    files = {kind: tmp_path / f"report.{kind}" for kind in OUTPUTS}
    flags = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    lengths = ["--prefix-length", "0,5", "--prefix-length", "7", "--task", "p3"]
    result = cli(shared_bundle, *SMALL, *lengths, *flags)
    assert (result.exit_code, result.stderr) == (0, "")
    report = from_json(files["json"].read_text(), "x")
    assert result.stdout == as_text(report)
    assert [row.label for row in report.cells] == ["0", "5", "7", "p3"]
    assert len(list(csv.DictReader(io.StringIO(files["csv"].read_text())))) == 4
    assert files["html"].read_text().startswith("<!DOCTYPE html>")
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files.values())


@pytest.mark.parametrize("kind", ["json", "csv", "html", "png"])
def test_an_output_to_standard_output_has_nothing_else_there(cli, shared_bundle, tmp_path, kind):
    files = [flag for other in OUTPUTS if other != kind for flag in (f"--{other}", tmp_path / f"r.{other}")]
    result = cli(shared_bundle, *SMALL, "--prefix-length", "0", f"--{kind}", "-", *files)
    assert (result.exit_code, result.stderr) == (0, "")
    match kind:
        case "json":
            assert [cell.label for cell in from_json(result.stdout, "-").cells] == ["0", "p20", "p3"]
        case "csv":
            assert [row["prefix_length"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["0", "20", "3"]
        case "html":
            assert result.stdout.startswith("<!DOCTYPE html>")
            assert result.stdout.rstrip().endswith("</html>")
        case _:
            assert result.stdout_bytes[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"r.{other}" for other in OUTPUTS if other != kind
    )


def test_a_narrow_terminal_gets_blocks_without_a_broken_number(cli, shared_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    result = cli(shared_bundle, *SMALL, "--prefix-length", "0", "--json", tmp_path / "r.json")
    tables = result.stdout.partition("latency\n")[2].partition("floor: the time")[0]
    assert "prefix 0\n  ms to first token: " in tables
    assert max(map(len, tables.splitlines())) <= 80  # titles are not folded in a pipe
    assert all(len(line) <= 40 for line in tables.splitlines() if line.startswith(" "))


def test_the_report_has_the_command_without_folders(cli, shared_bundle, tmp_path):
    result = cli(shared_bundle, *SMALL, "--prefix-length", 0, "--json", tmp_path / "r.json", "--prefix-length", "5,6")
    assert result.exit_code == 0
    command = json.loads((tmp_path / "r.json").read_text())["command"]
    assert command == (
        f"prefix-runtime bench {shared_bundle.name} --prefix-length 0,5,6 --prompt-length 4 --new-tokens 2 --rounds 1 "
        "--threads 1 --json r.json"
    )
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()


def test_without_options_the_lengths_are_those_of_the_documentation(cli, shared_bundle, tmp_path):
    assert cli(shared_bundle, *SMALL[:6], "--json", tmp_path / "r.json").exit_code == 0
    report = from_json((tmp_path / "r.json").read_text(), "x")
    assert [row.label for row in report.cells] == ["0", "1", "5", "10", "20", "50", "100", "200", "p20", "p3"]
    assert {row.setting for row in report.cells} == {(32, 1)}


def test_another_bundle_is_measured_in_the_same_rounds(cli, shared_bundle, bundle, tmp_path):
    lengths = ["--prefix-length", "0,5"]
    result = cli(shared_bundle, *SMALL, *lengths, "--against", bundle, "--json", tmp_path / "r.json")
    assert "A against B, a token" in result.stdout
    assert "not interleaved" not in result.stdout
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["bandwidth"] == content["against"]["bandwidth"]


def test_a_report_is_shown_beside_a_new_one(cli, shared_bundle, tmp_path):
    lengths = ["--prefix-length", "0,5"]
    cli(shared_bundle, *SMALL, *lengths, "--json", tmp_path / "r.json")
    result = cli(shared_bundle, *SMALL, *lengths, "--against", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    assert result.exit_code == 0
    assert "A against B, to first token" in result.stdout
    assert "A and B were not interleaved" in result.stdout
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + 2 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", 0], "rounds: expected whole numbers from 1 to 10000, found 0"),
        (["--new-tokens", 1], "new_tokens: expected whole numbers from 2"),
        (["--prefix-length", "-1"], "prefix_lengths: expected whole numbers from 0"),
        (["--prompt-length", "0"], "prompt_lengths: expected whole numbers from 1"),
        (["--batch-size", "0"], "batch_sizes: expected whole numbers from 1"),
        (["--task", "nope"], "task 'nope': there is none of this name; tasks here: p20, p3"),
        (["--prompt-length", "9999"], "expected something that fits the bundle"),
        (["--provider", "tpu"], "Error: provider: expected one of cpu"),
        (["--provider", "tensorrt"], "Error: provider: expected cpu, cuda or tensorrt-engine, found 'tensorrt'"),
        (
            ["--provider", "tensorrt-rtx"],
            "Error: provider: expected cpu, cuda or tensorrt-engine, found 'tensorrt-rtx'",
        ),
        (["--threads", "100000"], "Error: threads: expected 1 to 512, found 100000"),
        (["--json", "{tmp}/./r.csv"], "r.csv: expected a file of its own, found that of --json"),
        (["--json", "{tmp}/no/r.json"], "expected a file in a folder that exists, or -, found no folder {tmp}/no"),
        (
            ["--html", "/dev/null"],
            "expected a file in a folder that exists, or -, found something of that name that is no",
        ),
        (["--html", "{tmp}"], "expected a file in a folder that exists, or -, found a folder of that name"),
        (["--against", "{tmp}/nowhere"], "expected a bundle folder or a report that `bench --json` wrote, found none"),
        (["--against", "{tmp}"], "expected a bundle (a folder with manifest.json), found none"),
        (["--against", "{bundle}/config.json"], "of format 'prefix-export.bench', found None"),
        (["--against", "{bundle}/model.onnx"], "expected a report that `bench --json` wrote, found"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_anything_is_written(
    refused, shared_bundle, tmp_path, arguments, message
):
    places = {"tmp": tmp_path, "bundle": shared_bundle}
    arguments = [str(argument).format(**places) for argument in arguments]
    assert message.format(**places) in refused(shared_bundle, "--csv", tmp_path / "r.csv", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("numbers", ["", "x", "1,", "1;2", "1.5"])
def test_what_is_no_number_is_a_wrong_use(cli, shared_bundle, numbers):
    result = cli(shared_bundle, "--prefix-length", numbers)
    assert result.exit_code == 2
    assert "expected whole numbers with commas between" in result.stderr


def test_without_matplotlib_the_picture_is_refused_before_anything_is_measured(
    refused, shared_bundle, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench_module, "bench_together", lambda *_: pytest.fail("it was measured"))
    line = refused(shared_bundle, "--png", tmp_path / "r.png")
    assert "pip install 'prefix-runtime[report]'" in line


def test_a_disk_that_is_full_leaves_the_old_file(cli, shared_bundle, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    (tmp_path / "r.json").write_text("old")
    monkeypatch.setattr(files_module.os, "fsync", full)
    result = cli(shared_bundle, *SMALL, "--prefix-length", 0, "--json", tmp_path / "r.json")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path}/r.json: ")
    assert ".partial" not in result.stderr
    assert "prompt 4, batch 1: latency" in result.stdout, "what was measured is shown all the same"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("r.json", "old")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "term", "shown"),
    [(Terminal(), "xterm", True), (io.StringIO(), "xterm", False), (Terminal(), "dumb", False)],
    ids=["terminal", "pipe", "dumb terminal"],
)
def test_progress_is_shown_on_a_terminal_that_can_write_over_a_line(monkeypatch, stream, term, shown):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    with bench_cli.progress() as on_step:
        on_step(0, 0, "exporting")
        on_step(0, 20, "opening")
        on_step(10, 20, "round 1 of 2: prefix 5")
    written = stream.getvalue()
    assert bool(written) is shown
    if shown:
        lines = written.split("\r\x1b[2K")
        assert lines[1:3] == ["exporting", "[ 0/20] opening"]
        assert lines[3].startswith("[10/20] round 1 of 2: prefix 5, about ")
        assert lines[-1] == ""


@pytest.mark.parametrize(
    ("seconds", "left"), [(10, "about 10 s left"), (89, "about 89 s left"), (180, "about 3 min left")]
)
def test_the_time_that_is_left_is_as_long_as_what_was_done_half_way(monkeypatch, seconds, left):
    clock = iter([0.0, seconds])
    monkeypatch.setattr(bench_cli.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    line = bench_cli._ProgressLine()
    line.show(0, 10, "a")
    line.show(5, 10, "b")
    assert stream.getvalue().endswith(f"b, {left}")


TELLING = """
import signal
from contextlib import nullcontext
from prefix_runtime.cli import bench as bench_cli
from prefix_runtime.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
bench_cli.progress = lambda: nullcontext(lambda done, total, text: text.startswith("round 1 ") and print(flush=True))
main(prog_name="prefix-runtime")
"""


def test_an_interruption_ends_in_a_line_and_leaves_nothing(shared_bundle, tmp_path):
    command = [sys.executable, "-c", TELLING, "bench", shared_bundle, "--rounds", 9999, "--threads", 1]
    command += ["--json", tmp_path / "r.json"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=60)
    assert (process.returncode, output.strip(), error) == (130, "", "Aborted!\n")
    assert not list(tmp_path.iterdir())
