"""The project's own prefix file among the readers: chosen by what a file holds, not by its name."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from prefix_export import formats
from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import DECODER, ModelShape
from prefix_runtime import LayerGeometry, PrefixError, PrefixMismatchError
from tests.export.conftest import read_prefix


@pytest.fixture(scope="module")
def prefix(gpt2_adapter, base):
    return read_prefix(gpt2_adapter, base.shape)


@pytest.fixture
def file(prefix, tmp_path):
    path = tmp_path / "e2e.safetensors"
    prefix.save(path)
    return path


def test_a_prefix_file_reads_as_the_prefix_that_was_saved(file, prefix, base):
    assert read_prefix(file, base.shape) == prefix


@pytest.mark.parametrize("name", ["prefix.bin", "prefix", "adapter_model.safetensors"])
def test_the_content_decides_not_the_name(file, prefix, base, name):
    assert read_prefix(file.rename(file.with_name(name)), base.shape) == prefix


def test_a_prefix_file_beside_an_adapter_config_stays_a_prefix_file(adapter, base, prefix):
    longer = replace(prefix, position_base=0)
    longer.save(adapter / "mine.safetensors")
    assert read_prefix(adapter / "mine.safetensors", base.shape) == longer
    assert read_prefix(adapter, base.shape) == prefix


def test_a_prefix_file_describes_itself(file, prefix):
    described = formats.describe(file)
    assert described["format"] == "prefix file"
    assert described["source"] == "peft-prefix-tuning"
    assert described["content"] == f"sha256:{prefix.content_hash}"
    assert (described["layers"], described["key/value heads"], described["head size"]) == ("3", "4", "16")
    assert (described["prefix length"], described["position base"]) == ("3", "3")


@pytest.mark.parametrize(
    ("layers", "heads", "head_dim", "parts"),
    [
        (4, 4, 16, ["expected 4 layers", "found 3"]),
        (3, 2, 16, ["expected 2 key/value heads", "found 4"]),
        (3, 4, 32, ["expected head size 32", "found 16"]),
    ],
)
def test_a_prefix_for_another_shape_of_model_is_refused(file, layers, heads, head_dim, parts):
    shape = ModelShape("m", DECODER, {"decoder": (LayerGeometry(heads, head_dim),) * layers}, 64)
    with pytest.raises(PrefixMismatchError) as caught:
        formats.read(file, shape)
    assert all(part in str(caught.value) for part in [str(file), *parts])


def test_nothing_at_the_path_is_refused(tmp_path, base):
    with pytest.raises(CheckpointError, match=r"nowhere: expected a trained prefix, .*, found nothing there"):
        read_prefix(tmp_path / "nowhere", base.shape)


@pytest.mark.parametrize("verb", [formats.describe, lambda path: formats.read(path, None)], ids=["describe", "read"])
def test_a_file_of_no_family_is_refused_with_the_families_that_there_are(tmp_path, verb):
    path = tmp_path / "weights.safetensors"
    save_file({"wte.weight": np.ones((2, 2), np.float32)}, path)
    with pytest.raises(CheckpointError) as caught:
        verb(path)
    assert str(path) in str(caught.value)
    assert all(reader.NAME in str(caught.value) for reader in formats.READERS)


@pytest.mark.parametrize("content", ["hello", ""])
def test_what_holds_no_checkpoint_is_refused(tmp_path, base, content):
    path = tmp_path / "thing"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"thing: expected safetensors, a checkpoint of"):
        read_prefix(path, base.shape)


@pytest.mark.parametrize("kept", [7, 100, -1])
def test_a_truncated_prefix_file_is_called_damaged(file, base, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(PrefixError, match=r"e2e\.safetensors: expected a whole safetensors file"):
        read_prefix(file, base.shape)


def test_a_pickle_is_refused_and_never_unpickled(tmp_path, base, trap):
    for name in ("checkpoint.pt", "checkpoint.bin", "checkpoint.safetensors"):
        trap.set(tmp_path / name)
        with pytest.raises((CheckpointError, PrefixError), match=r"safetensors"):
            read_prefix(tmp_path / name, base.shape)
    assert not trap.sprung


def test_reading_changes_nothing(file, base, tmp_path):
    copy = shutil.copy(file, tmp_path / "copy")
    read_prefix(file, base.shape)
    assert file.read_bytes() == copy.read_bytes()
