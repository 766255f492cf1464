"""`prefix-export bench`: a model without weights is built aside, measured and removed; the rest is the runtime's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from prefix_export.build import random_bundle
from prefix_export.cli.main import main
from prefix_export.errors import PrefixExportError
from prefix_runtime.bench import bandwidth

SMALL = ["--rounds", 1, "--new-tokens", 2, "--threads", 1, "--prompt-length", 4, "--prefix-length", "0,5"]


@pytest.fixture(autouse=True)
def _little_to_read(monkeypatch):
    monkeypatch.setattr(bandwidth, "MOST_BYTES", 1 << 20)


@pytest.fixture
def config(workshop, tmp_path):
    """A folder with a configuration and no weights."""
    folder = tmp_path / "small-llama"
    folder.mkdir()
    (folder / "config.json").write_text((workshop.model("llama") / "config.json").read_text())
    return folder


@pytest.fixture
def aside(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], prog_name="prefix-export")


def test_a_configuration_is_measured_without_weights(config, aside, tmp_path):
    result = invoke("--model", config, "--random", *SMALL, "--json", tmp_path / "r.json")
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads((tmp_path / "r.json").read_text())
    assert (content["subject"]["model"], content["subject"]["name"]) == ("small-llama", "random-weights")
    assert content["command"].startswith("prefix-export bench --model small-llama --random --prefix-length 0,5")
    assert [row["prefix_length"] for row in content["cells"]] == [0, 5]
    assert not list(aside.iterdir())


def test_a_bundle_is_measured_as_by_the_runtime(shared_bundle):
    result = invoke(shared_bundle, *SMALL, "--task", "p3")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "p3 (3)" in result.stdout


def test_how_it_is_built_is_passed_on_and_a_failure_leaves_nothing(config, aside, monkeypatch):
    requests = []

    def capture(request, *_):
        requests.append(request)
        raise PrefixExportError("that is enough")

    monkeypatch.setattr(random_bundle, "build", capture)
    flags = ["--precision", "int4", "--block-size", 64, "--cache", "int8"]
    result = invoke("--model", config, "--random", *flags)
    assert (result.exit_code, result.stderr) == (1, "Error: that is enough\n")
    (request,) = requests
    assert (request.prefixes, request.verify) == ({}, False)
    assert (request.precision, request.block_size, request.cache) == ("int4", 64, "int8")
    assert Path(request.model).name == "small-llama"
    assert not list(aside.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name either BUNDLE or --model"),
        (["bundle", "--model", "gpt2", "--random"], "name either BUNDLE or --model"),
        (["--model", "gpt2"], "--model needs --random"),
        (["--model", "gpt2", "--random", "--task", "e2e"], "--task goes with BUNDLE"),
        (["bundle", "--random"], "--random goes with --model"),
        (["bundle", "--precision", "int8"], "--precision goes with --model"),
        (["bundle", "--block-size", "32"], "--block-size goes with --model"),
    ],
)
def test_a_wrong_use_ends_with_status_2(arguments, said):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_a_model_that_is_not_there_ends_in_one_line(tmp_path, aside):
    result = invoke("--model", tmp_path / "nowhere", "--random")
    assert result.exit_code == 1
    assert "expected a Hub id or a folder with a config.json" in result.stderr
    assert not list(aside.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--html", "{tmp}/no/r.html"], "expected a file in a folder that exists"),
        (["--rounds", "0"], "rounds: expected whole numbers from 1"),
        (["--against", "{tmp}/nowhere"], "expected a bundle folder or a report"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_built(config, aside, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(random_bundle, "build", lambda *_: pytest.fail("it was built"))
    result = invoke("--model", config, "--random", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert said in result.stderr
    assert not list(aside.iterdir())
