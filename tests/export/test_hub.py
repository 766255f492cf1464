"""Names with revisions: what is a Hub id, what is a path, and what a model is called."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from prefix_export.cli import main as cli
from prefix_export.errors import ModelError
from prefix_export.models.hub import commit_of, shown_name, split_revision, with_revision


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model@v1.0", ("org/model", "v1.0")),
        ("gpt2@main", ("gpt2", "main")),
        ("org/model@refs/pr/3", ("org/model", "refs/pr/3")),
        ("org/model", ("org/model", None)),
        ("org/model@", ("org/model@", None)),
        ("@v1", ("@v1", None)),
        ("./folder@v1", ("./folder@v1", None)),
        ("/folder@v1", ("/folder@v1", None)),
        ("~/folder@v1", ("~/folder@v1", None)),
    ],
)
def test_a_revision_follows_a_hub_id(name, expected):
    assert split_revision(name) == expected


def test_a_path_that_exists_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model@v1").mkdir()
    (tmp_path / "adapter@v2.safetensors").touch()
    assert split_revision("model@v1") == ("model@v1", None)
    assert split_revision("adapter@v2.safetensors") == ("adapter@v2.safetensors", None)


def test_a_model_is_called_by_its_folder_its_file_or_its_id(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny.Q8_0.GGUF").touch()
    assert shown_name(f"{tmp_path}/tiny/") == "tiny"
    assert shown_name(str(tmp_path / "tiny.Q8_0.GGUF")) == "tiny.Q8_0"
    assert shown_name("org/model@v1") == "org/model"
    assert shown_name("org/model-1.5") == "org/model-1.5"


def test_a_revision_given_apart_belongs_to_a_hub_id():
    assert with_revision("org/model", "v1") == "org/model@v1"
    assert with_revision("org/model@v1", None) == "org/model@v1"
    assert with_revision(None, None) is None


@pytest.mark.parametrize(
    ("model", "found"),
    [(None, "found none"), ("org/model@v1", "the revision 'v1' already"), (".", "a path, which has no revisions")],
)
def test_a_revision_without_a_hub_id_is_refused(model, found):
    with pytest.raises(ModelError, match=f"expected (a Hub id as --model|--model with a Hub id), .*{found}"):
        with_revision(model, "v2")


@pytest.mark.parametrize(
    "command",
    [
        ["build", "--output", "none"],
        ["verify", "."],
        ["inspect", "."],
        ["fold", "--text", "fox", "--output", "none"],
        ["bench", "--random"],
    ],
    ids=lambda command: command[0],
)
def test_commands_take_a_revision_of_a_hub_id_alone(command):
    result = CliRunner().invoke(cli.main, [*command, "--model", ".", "--revision", "v1"])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "--revision v1: expected a Hub id as --model, found a path" in result.output


def test_the_hubs_cache_tells_the_commit():
    assert commit_of("/cache/models--org--tiny/snapshots/0123abc/config.json") == "0123abc"
    assert commit_of("/cache/models--org--tiny/snapshots/0123abc/deep/model.gguf") == "0123abc"
    assert commit_of("/home/snapshots/tiny/config.json") is None
    assert commit_of("/home/tiny/config.json") is None
