"""What a signal does to a program: one line, the exit code of the signal, no traceback."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
import time

import pytest

from prefix_runtime import interrupts
from prefix_runtime.interrupts import ending_when_stopped

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def _handlers():
    """The handlers of a program that a terminal started, and afterwards those of before."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_program_with_its_exit_code_after_clean_up(number, capsys):
    cleaned = []

    def work():
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(number)

    with pytest.raises(SystemExit) as caught, ending_when_stopped():
        work()
    assert (caught.value.code, cleaned) == (128 + number, [number])
    assert capsys.readouterr() == ("", "Aborted!\n")


def test_a_library_that_makes_an_error_of_a_signal_does_not_change_what_ended_the_process(capsys):
    def trace():
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit as error:
            raise ValueError("cannot trace") from error

    with pytest.raises(SystemExit) as caught, ending_when_stopped():
        trace()
    assert caught.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "Aborted!\n"


def test_on_a_terminal_the_line_begins_behind_what_the_terminal_shows_of_ctrl_c(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit), ending_when_stopped():
        signal.raise_signal(signal.SIGINT)
    assert stream.getvalue() == "\nAborted!\n"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_who_ignores_the_end_of_a_terminal_goes_on():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with ending_when_stopped():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_during_a_callback_that_can_raise_nothing_is_not_lost(capsys):
    class Watched:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def work():
        watched = Watched()
        del watched
        time.sleep(60)

    with pytest.raises(SystemExit) as caught, ending_when_stopped():
        work()
    assert (caught.value.code, capsys.readouterr().err) == (130, "Aborted!\n")


def test_an_error_without_a_signal_stays_what_it_is():
    with pytest.raises(ValueError, match="cannot trace"), ending_when_stopped():
        raise ValueError("cannot trace")


def test_a_command_runs_in_any_thread():
    found = []

    def run():
        with ending_when_stopped():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


ENTRY = """
import signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
interrupted = sys.argv.pop(1)

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from {package}.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("package", "module", "arguments"),
    [
        ("prefix_runtime", "click", ["--help"]),
        ("prefix_runtime", "prefix_runtime.cli.main", ["--help"]),
        ("prefix_runtime", "numpy", ["inspect", "nowhere"]),
        ("prefix_export", "click", ["--help"]),
        ("prefix_export", "prefix_export.build.request", ["build", "--model", "m"]),
        ("prefix_export", "torch", ["build", "--model", "m"]),
        ("prefix_export", "transformers", ["fold", "a/b", "--model", "m", "--output", "out.safetensors"]),
    ],
)
def test_ctrl_c_during_an_import_ends_in_one_line(tmp_path, package, module, arguments):
    pytest.importorskip(package)
    command = [sys.executable, "-c", ENTRY.format(package=package), module, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "Aborted!\n")
    assert not list(tmp_path.iterdir())


def test_at_once_means_without_clean_up_and_only_where_ctrl_c_is_heeded():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts.exit_at_once()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
