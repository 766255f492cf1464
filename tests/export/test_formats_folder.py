"""Folders that training runs leave behind: which file is taken, and what is said of it."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from prefix_export import formats
from prefix_export.errors import CheckpointError
from prefix_export.formats.shared.folder import find_weights
from tests.export.conftest import read_prefix

ADAPTER = "adapter_model.safetensors"


def put(*places):
    """A file of tensors at each of these places."""
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"prompt_embeddings": torch.ones(2, 4)}
        save_file(tensors, place) if place.suffix == ".safetensors" else torch.save(tensors, place)


def refused(folder, *parts):
    with pytest.raises(CheckpointError) as caught:
        find_weights(folder)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.fixture(scope="module")
def trainers_output(workshop, tmp_path_factory):
    """What transformers' Trainer and PEFT write of two adapters, of which one is called default."""

    def run(name):
        out = tmp_path_factory.mktemp("run") / "out"
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = AutoModelForCausalLM.from_pretrained(workshop.model("gpt2"))
        wrapped = peft.get_peft_model(model, config, adapter_name=name)
        row = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}
        arguments = TrainingArguments(
            str(out), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, learning_rate=0.5,
        )  # fmt: skip
        trainer = Trainer(wrapped, arguments, train_dataset=[row] * 4)
        trainer.train()
        return trainer, out

    return {name: run(name) for name in ("default", "support")}


class TestTrainer:
    def test_several_checkpoints_are_listed_newest_first(self, trainers_output):
        refused(trainers_output["default"][1], "expected one trained prefix, found 2: checkpoint-2, checkpoint-1;")
        refused(trainers_output["support"][1], "found 2: checkpoint-2/support, checkpoint-1/support; name one of them")

    @pytest.mark.parametrize(("name", "inside"), [("default", "checkpoint-2"), ("support", "checkpoint-2/support")])
    def test_a_checkpoint_is_the_adapter_in_it(self, trainers_output, base, name, inside):
        out = trainers_output[name][1]
        found, named = (read_prefix(out / each, base.shape) for each in ("checkpoint-2", inside))
        assert found == named != read_prefix(out / "checkpoint-1", base.shape)

    @pytest.mark.parametrize(("name", "inside"), [("default", "."), ("support", "support")])
    def test_what_a_finished_run_saved_wins(self, trainers_output, base, tmp_path, name, inside):
        trainer, out = trainers_output[name]
        out = shutil.copytree(out, tmp_path / "out")
        trainer.save_model(str(out))
        trained = formats.read(out, base.shape)
        assert trained.parts[""] == read_prefix(out / inside / ADAPTER, base.shape)
        notes = [line for line in trained.warnings if "read support, and no checkpoint (checkpoint-2/support" in line]
        assert len(notes) == (name == "support")


class TestWhatIsTaken:
    def test_an_adapter_before_the_base_model_in_its_folder(self, adapter, base):
        alone = read_prefix(adapter, base.shape)
        base.model.save_pretrained(adapter)
        trained = formats.read(adapter, base.shape)
        assert trained.parts[""] == alone
        assert trained.warnings[0].endswith("read adapter_model.safetensors; model.safetensors beside it is taken for "
                                            "the base model's")  # fmt: skip

    @pytest.mark.parametrize(
        ("files", "taken"),
        [
            (["adapter_model.bin", "model.safetensors"], "adapter_model.bin"),
            (["adapter_model.bin", "adapter_model.safetensors"], "adapter_model.safetensors"),
            (["pytorch_model.bin", "model.safetensors"], "model.safetensors"),
            (["pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state_1.pth"], "pytorch_model.bin"),
            (["checkpoint.pt", "scheduler.pt", "scaler.pt"], "checkpoint.pt"),
            (["pytorch_model_fsdp.bin", "optimizer.bin"], "pytorch_model_fsdp.bin"),
            (["lightning_logs/version_0/checkpoints/last.ckpt"], "lightning_logs/version_0/checkpoints/last.ckpt"),
            (["checkpoint_0/model.safetensors", "checkpoint_0/optimizer.bin"], "checkpoint_0/model.safetensors"),
            (["global_step9/mp_rank_00_model_states.pt", "global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
             "global_step9/mp_rank_00_model_states.pt"),
        ],
    )  # fmt: skip
    def test_weights_and_not_the_state_of_training(self, tmp_path, files, taken):
        put(*(tmp_path / file for file in files))
        found = find_weights(tmp_path)
        assert found.weights == tmp_path / taken
        assert len(found.notes) == ("/" in taken or files == ["adapter_model.bin", "model.safetensors"])

    def test_another_adapter_beside_pefts_default_is_said(self, tmp_path):
        put(tmp_path / ADAPTER, tmp_path / "support" / ADAPTER, tmp_path / "checkpoint-3" / ADAPTER)
        (note,) = find_weights(tmp_path).notes
        assert note.endswith("read its own adapter, PEFT's 'default'; there are others in support")

    def test_the_file_is_described(self, tmp_path, gpt2_adapter):
        shutil.copytree(gpt2_adapter, tmp_path / "out/support")
        assert formats.describe(tmp_path / "out")["file"] == f"support/{ADAPTER}"

    def test_the_shard_with_the_prefix(self, tmp_path):
        names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
        put(*(tmp_path / name for name in names))
        index = {"base_model.a": names[0], "prompt_encoder.default.embedding.weight": names[1]}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        assert find_weights(tmp_path).weights.name == names[1]


class TestWhatIsAskedFor:
    def test_named_adapters(self, tmp_path):
        put(tmp_path / "a" / ADAPTER, tmp_path / "b" / ADAPTER)
        refused(tmp_path, f"{tmp_path}: expected one trained prefix, found 2: a, b; name one of them")

    def test_files_of_one_folder_newest_first(self, tmp_path):
        put(*(tmp_path / f"epoch={epoch}-step={step}.ckpt" for epoch, step in ((0, 9), (1, 10))))
        refused(
            tmp_path, "expected one file of tensors, found epoch=1-step=10.ckpt, epoch=0-step=9.ckpt; name the file"
        )

    def test_many_are_not_all_listed(self, tmp_path):
        put(*(tmp_path / f"checkpoint-{step}" / ADAPTER for step in range(100, 120)))
        refused(tmp_path, "found 20: checkpoint-119, checkpoint-118, ", ", …; name one")

    @pytest.mark.parametrize(
        ("file", "message"),
        [
            (
                "zero_pp_rank_0_mp_rank_00_model_states.pt",
                "ZeRO-3, whose files hold parts of tensors; run 'python zero_to",
            ),
            ("mp_rank_01_model_states.pt", "a model-parallel checkpoint of DeepSpeed's (mp_rank_01_model_states.pt)"),
            ("__0_0.distcp", "run 'accelerate merge-weights"),
        ],
    )
    def test_whole_tensors(self, tmp_path, file, message):
        place = tmp_path / "checkpoint-5/inner"
        put(place / "mp_rank_00_model_states.pt", place / file)
        for folder in (tmp_path, place):
            refused(folder, f"{place}: expected whole tensors", message)

    def test_parts_do_not_hide_a_finished_adapter(self, tmp_path):
        put(tmp_path / "checkpoint-5/global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt", tmp_path / ADAPTER)
        assert find_weights(tmp_path).weights == tmp_path / ADAPTER


class TestBounds:
    def test_links_to_folders_are_not_followed(self, tmp_path):
        put(tmp_path / "away" / ADAPTER)
        (tmp_path / "given").mkdir()
        (tmp_path / "given/link").symlink_to(tmp_path / "away")
        (tmp_path / "given/itself").symlink_to(tmp_path / "given")
        refused(tmp_path / "given", "found no file of tensors in it")

    def test_links_to_files_outside_are_not_followed(self, tmp_path):
        put(tmp_path / "secret.safetensors", tmp_path / "given/deep/inside.safetensors")
        (tmp_path / "given/deep" / ADAPTER).symlink_to(tmp_path / "secret.safetensors")
        assert find_weights(tmp_path / "given").weights.name == "inside.safetensors"

    def test_links_within_the_hubs_cache_are_followed(self, tmp_path):
        repository = tmp_path / "models--a--b"
        put(repository / "blobs/123.safetensors")
        (repository / "snapshots/abc/support").mkdir(parents=True)
        (repository / "snapshots/abc/support" / ADAPTER).symlink_to("../../../blobs/123.safetensors")
        assert find_weights(repository / "snapshots/abc").weights.parent.name == "support"

    def test_depth_and_count_end(self, tmp_path, monkeypatch):
        put(tmp_path / "deep/1/2/3/4/5" / ADAPTER)
        refused(tmp_path / "deep", "found no file of tensors in it")
        monkeypatch.setattr("prefix_export.formats.shared.folder._MOST_ENTRIES", 20)
        for number in range(21):
            (tmp_path / "deep/1" / f"{number}.txt").touch()
        refused(tmp_path / "deep", "more than 20 files and folders")

    @pytest.mark.parametrize(
        "content", ['{"weight_map": []}', "[" * 100_000, "[]", '{"weight_map": {"prompt_encoder": 1}}']
    )
    def test_an_index_of_another_kind_is_none(self, tmp_path, content):
        (tmp_path / "x.index.json").write_text(content)
        put(tmp_path / "x.pt")
        assert find_weights(tmp_path).weights == tmp_path / "x.pt"

    def test_an_index_leads_nowhere_else(self, tmp_path):
        put(tmp_path / "away.bin", tmp_path / "given/own.bin")
        index = {"weight_map": {"prompt_encoder.a": "../away.bin"}}
        (tmp_path / "given/x.index.json").write_text(json.dumps(index))
        assert find_weights(tmp_path / "given").weights.name == "own.bin"


FOREIGN = {
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html><body>404", "a web page, such as a login or error page"),
    "nothing": (b"", "an empty file; download or save it again"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 30, "a gzip archive; unpack it first"),
    "tar": (b"name".ljust(257, b"\0") + b"ustar\0" + b"\0" * 300, "a tar archive; unpack it first"),
    "zip": (b"PK\x03\x04" + b"\0" * 30, "expected a whole checkpoint that torch.save wrote"),
    "GGUF": (b"GGUF\3\0\0\0", "a GGUF file, which holds a model and no prefix; give it to --model"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
}


@pytest.mark.parametrize("name", [ADAPTER, "adapter_model.bin"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(tmp_path, base, kind, name):
    content, message = FOREIGN[kind]
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError) as caught:
            formats.read(path, base.shape)
        assert f"{tmp_path / name}: expected " in str(caught.value)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_configuration_in_place_of_tensors_is_told(adapter, base):
    with pytest.raises(
        CheckpointError, match=r"found a configuration; name the file of tensors beside it, or the folder"
    ):
        formats.read(adapter / "adapter_config.json", base.shape)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"# adapter"}, "no file of tensors in it, only README.md"),
        ({"adapter_config.json": b"{}", "README.md": b"#"}, "only README.md, adapter_config.json"),
        ({"prefix.tar.gz": b"\x1f\x8b\x08"}, "only prefix.tar.gz (a gzip archive; unpack it first)"),
        ({"training_args.bin": b"PK\x03\x04"}, "only training_args.bin"),
    ],
)
def test_a_folder_without_tensors_says_what_is_in_it(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    refused(tmp_path, message)
