"""Files from outside: whatever their bytes, a reader returns what they hold or raises a typed error; nothing runs."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prefix_export import formats
from prefix_export.errors import CheckpointError, PrefixExportError
from prefix_export.models.model_shape import ModelShape
from prefix_runtime import LayerGeometry, Prefix, PrefixMismatchError, PrefixRuntimeError
from prefix_runtime.machine import peak_memory
from tests.conftest import SEED

from .mutations import FILES, GPT2, HIDDEN, LENGTH, SEEDS, WIDTH, read_mutations, unsound, with_odd_value, write

MOST_BYTES = 256 << 20


def refused(path, *parts, shape=GPT2):
    with pytest.raises(CheckpointError) as caught:
        formats.read(path, shape)
    message = str(caught.value)
    assert all(part in message for part in (str(path), *parts)), message
    assert "\n" not in message


class TestPickles:
    def test_a_sparse_tensor_is_refused_by_the_scan(self, tmp_path):
        # Its indices lie outside of it: what made it dense would write there.
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            tensor = torch.sparse_coo_tensor(torch.tensor([[9999], [0]]), torch.ones(1), (10, 2))
        torch.save({"control_trans": tensor}, tmp_path / "sparse.bin")
        refused(tmp_path / "sparse.bin", "expected a pickle of dense tensors alone", "_rebuild_sparse_tensor")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_anything_but_tensors_is_refused_by_name(self, tmp_path, legacy):
        options = {"_use_new_zipfile_serialization": not legacy}
        torch.save({"wte.weight": torch.ones(2, 2), "args": bytearray(5)}, tmp_path / "args.bin", **options)
        refused(tmp_path / "args.bin", "expected a pickle of dense tensors alone", "bytearray")

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_code_is_never_run(self, tmp_path, trap, protocol):
        content = {"state_dict": trap}
        (tmp_path / "raw.bin").write_bytes(pickle.dumps(content, protocol=protocol))
        torch.save(content, tmp_path / "zip.bin", pickle_protocol=protocol)
        torch.save(content, tmp_path / "old.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        for name in ("raw.bin", "zip.bin", "old.bin"):
            refused(tmp_path / name)
        assert not trap.sprung

    def test_a_view_that_repeats_what_is_stored_is_refused(self, tmp_path):
        tensor = torch.ones(1).expand(1 << 20, 1 << 14)
        torch.save({"control_trans": tensor}, tmp_path / "view.bin")
        refused(tmp_path / "view.bin", "expected no more numbers than are stored", "[1048576, 16384]")

    def test_a_compressed_archive_is_refused(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
        refused(tmp_path / "bomb.bin", "found compressed ones")

    def test_entries_that_share_their_bytes_are_refused(self, tmp_path):
        # Uncompressed, a file of many entries that are one: it holds more than it is large.
        data = b"\0" * 100_000
        with zipfile.ZipFile(tmp_path / "shared.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}))
            archive.writestr("archive/data/0", data)
            entry = archive.getinfo("archive/data/0")
            for number in range(1, 50):
                again = zipfile.ZipInfo(f"archive/data/{number}")
                again.header_offset, again.CRC = entry.header_offset, entry.CRC
                again.file_size = again.compress_size = len(data)
                archive.filelist.append(again)
        assert (tmp_path / "shared.bin").stat().st_size < 2 * len(data)
        refused(tmp_path / "shared.bin", "expected entries as large as the file at the most, found larger ones")

    def test_a_storage_that_says_it_is_larger_than_its_entry_is_refused(self, tmp_path):
        torch.save({"control_trans": torch.ones(LENGTH * WIDTH)}, tmp_path / "small.bin")
        whole = (tmp_path / "small.bin").read_bytes()
        with zipfile.ZipFile(tmp_path / "small.bin") as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        count, huge = b"K" + bytes([LENGTH * WIDTH]), b"J" + (1 << 30).to_bytes(4, "little")
        with zipfile.ZipFile(tmp_path / "huge.bin", "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content.replace(count, huge) if name.endswith("data.pkl") else content)
        assert huge in (tmp_path / "huge.bin").read_bytes()
        assert huge not in whole
        before = peak_memory()
        refused(tmp_path / "huge.bin", "expected a whole checkpoint that torch.save wrote")
        assert peak_memory() - before < MOST_BYTES

    def test_an_archive_of_another_kind_is_refused(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
            archive.writestr("readme.txt", b"hello")
        refused(tmp_path / "other.bin", "found a zip file of another kind")

    def test_whole_numbers_are_no_prefix(self, tmp_path):
        torch.save({"control_trans": torch.ones(LENGTH * WIDTH, dtype=torch.int64)}, tmp_path / "ints.bin")
        refused(tmp_path / "ints.bin", "expected floating point, found torch.int64")

    def test_what_is_scanned_is_what_torch_would_find(self, tmp_path):
        # torch looks entries up whatever the case of their names.
        torch.save({"a": torch.ones(1)}, tmp_path / "plain.bin")
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "sparse.bin")
        with zipfile.ZipFile(tmp_path / "both.bin", "w") as both:
            for name, cased in (("plain", str.lower), ("sparse", str.upper)):
                with zipfile.ZipFile(tmp_path / f"{name}.bin") as source:
                    pickled = next(entry for entry in source.namelist() if entry.endswith("data.pkl"))
                    both.writestr(f"both/{cased('data.pkl')}", source.read(pickled))
        refused(tmp_path / "both.bin", "found a zip file of another kind")

    def test_a_damaged_pickle_gives_no_advice_to_run_it(self, tmp_path):
        torch.save({"control_trans": torch.ones(4)}, tmp_path / "x.bin")
        whole = (tmp_path / "x.bin").read_bytes()
        at = whole.index(b"_rebuild_tensor_v2")
        (tmp_path / "x.bin").write_bytes(whole[: at + 25] + b"\xff" + whole[at + 26 :])
        with pytest.raises(CheckpointError) as caught:
            formats.read(tmp_path / "x.bin", GPT2)
        assert "weights_only" not in str(caught.value)

    def test_a_name_that_misleads_does_not(self, tmp_path):
        torch.save({"control_trans": torch.ones(LENGTH * WIDTH)}, tmp_path / "pickle.safetensors")
        save_file({"control_trans": torch.ones(LENGTH * WIDTH)}, tmp_path / "safe.bin")
        left, right = (formats.read(tmp_path / name, GPT2).parts[""] for name in ("pickle.safetensors", "safe.bin"))
        assert left.sites["decoder"][0].key.tolist() == right.sites["decoder"][0].key.tolist()


class TestNames:
    @pytest.mark.parametrize("category", ["/tmp/away", "../away", "a/b", "a\0b", "a b", ""])
    def test_a_label_leads_nowhere(self, tmp_path, category):
        content, configs, shape = SEEDS["control-prefixes"]
        named = {name.replace("cats", category): tensor for name, tensor in content.items()}
        torch.save(named, tmp_path / "pytorch_model.bin")
        for name, config in configs.items():
            (tmp_path / name).write_text(json.dumps(config))
        refused(tmp_path, "expected names of letters, digits", shape=shape)

    def test_what_a_file_says_cannot_steer_a_terminal(self, tmp_path):
        content, configs, _ = SEEDS["peft"]
        config = configs["adapter_config.json"] | {"base_model_name_or_path": "\x1b[31m\ud800"}
        path = write(tmp_path, content, {"adapter_config.json": config}, "safetensors")
        assert formats.describe(path)["base model"] == "\\x1b[31m\\ud800"


class TestArrays:
    def test_objects_are_never_unpickled(self, tmp_path, trap):
        np.save(tmp_path / "objects.npy", np.array([trap], object), allow_pickle=True)
        refused(tmp_path / "objects.npy", "expected a whole .npy file of numbers")
        assert not trap.sprung

    def test_a_shape_that_the_file_does_not_hold_is_refused(self, tmp_path):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 30, HIDDEN)}
        )
        (tmp_path / "absurd.npy").write_bytes(header.getvalue() + b"\0" * 64)
        refused(tmp_path / "absurd.npy", "expected a whole .npy file")


def test_a_hole_in_a_file_is_refused_before_it_is_read(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 2048)})
    with (tmp_path / "hole.npy").open("wb") as file:
        file.write(header.getvalue())
        file.truncate(len(header.getvalue()) + (8 << 30))
    before = peak_memory()
    with pytest.raises(PrefixMismatchError, match=r"expected a width of 4 \(a soft prompt"):
        formats.read(tmp_path / "hole.npy", GPT2)
    assert peak_memory() - before < MOST_BYTES


def test_a_head_of_many_names_for_one_tensor_is_refused(tmp_path):
    weight = torch.ones(1024, 1024)
    content = {f"base_model.head{number}.weight": weight for number in range(100)}
    _, configs, shape = SEEDS["peft"]
    path = write(tmp_path, content | SEEDS["peft"][0], configs, "zip")
    refused(path, "expected a head of at most 268435456 bytes, found 419430400", shape=shape)


def test_a_folder_with_several_files_asks_for_one(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save(torch.ones(LENGTH, HIDDEN), tmp_path / name)
    refused(tmp_path, "expected one file of tensors, found a.pt, b.pt; name the file")


MUTATIONS = 5_000
"""Files with changed bytes that all tests here read together; `tests/campaigns/hostile_files.py` reads more."""


@pytest.mark.parametrize(("name", "how"), FILES)
def test_no_bytes_do_more_than_raise_a_typed_error(tmp_path, name, how):
    before = peak_memory()
    was_read = list(read_mutations(tmp_path, name, how, MUTATIONS // len(FILES), SEED))
    assert peak_memory() - before < MOST_BYTES
    assert not all(was_read), "nothing was refused: the mutations would show nothing"


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_no_shapes_names_or_settings_do_more_than_raise_a_typed_error(tmp_path, name):
    """Sound files of unsound content, which random bytes hardly ever are."""
    content, configs, shape = SEEDS[name]
    if isinstance(content, Prefix):
        content = {each: torch.from_numpy(np.array(array)) for each, array in content._tensors().items()}
    random = np.random.default_rng(SEED)
    wrong = 0
    for number in range(100):
        tensors = unsound(content, random)
        changed = {each: with_odd_value(config, random) for each, config in configs.items()}
        path = write(tmp_path, tensors, changed, ("zip", "safetensors")[number % 2])
        for verb in (lambda path: formats.read(path, shape), formats.describe):
            try:
                verb(path)
            except (PrefixExportError, PrefixRuntimeError) as error:
                assert "\n" not in str(error)  # noqa: PT017  # what is read may be sound
                wrong += 1
    assert wrong > 25


@pytest.mark.parametrize("family", formats.FORMATS)
def test_a_reader_that_is_named_does_no_more_than_raise_a_typed_error(tmp_path, family):
    """Of every family's checkpoints, sound and unsound."""
    random = np.random.default_rng(SEED)
    wrong = 0
    for name, (content, configs, shape) in SEEDS.items():
        for number in range(25):
            tensors = content if isinstance(content, Prefix) or not number else unsound(content, random)
            path = write(tmp_path, tensors, configs, ("zip", "safetensors")[number % 2])
            for verb in (lambda path: formats.read(path, shape, family), lambda path: formats.describe(path, family)):  # noqa: B023
                try:
                    verb(path)
                except (PrefixExportError, PrefixRuntimeError) as error:
                    assert "\n" not in str(error), name  # noqa: PT017  # what is read may be sound
                    wrong += 1
    assert wrong > 100


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1), st.booleans())
def test_fold_save_load_gives_the_same_prefix(tmp_path_factory, layers, heads, length, seed, has_head):
    folder = tmp_path_factory.mktemp("folded")
    random = np.random.default_rng(seed)
    prompt = random.standard_normal((length, 2 * layers * heads * 8)).astype(np.float32)
    tensors = {"prompt_embeddings": torch.from_numpy(prompt)}
    if has_head:
        tensors["base_model.score.weight"] = torch.ones(2, heads * 8)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": length}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    geometry = LayerGeometry(heads, 8)
    shape = ModelShape("m", GPT2.kind, {"decoder": (geometry,) * layers}, heads * 8)
    (prefix,) = formats.read(folder, shape).parts.values()
    prefix.save(folder / "own")
    assert Prefix.load(folder / "own") == prefix
    (again,) = formats.read(folder / "own", shape).parts.values()
    assert again == prefix
