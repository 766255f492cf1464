"""The base model: found, loaded whole or refused by name, and identified by its weights alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefix_export.errors import ModelError, UnsupportedArchitectureError
from prefix_export.models import fingerprint, load_base_model
from prefix_runtime import Geometry, LayerGeometry


@pytest.fixture
def folder(workshop, tmp_path):
    """A copy of a Llama folder, to be changed and broken."""
    return Path(shutil.copytree(workshop.model("llama"), tmp_path / "model"))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def print_of(folder):
    return load_base_model(str(folder)).fingerprint


def refusal(name):
    with pytest.raises(ModelError) as caught:
        load_base_model(str(name))
    message = str(caught.value)
    assert message.startswith(f"model {str(name)!r}: ")
    assert "\n" not in message
    return message


def test_a_folder_is_loaded_in_float32_with_its_geometry(workshop):
    base = load_base_model(str(workshop.model("llama")))
    assert base.name == "llama-0"
    assert base.geometry == Geometry({"decoder": (LayerGeometry(2, 16),) * 3}, context_length=320, vocab_size=384)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert not base.model.training


def test_a_folder_is_called_by_its_last_part_however_it_is_written(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert {load_base_model(name).name for name in (".", f"{folder}/", "../model")} == {"model"}


def test_a_tokenizer_is_loaded_where_there_is_one(workshop):
    base = load_base_model(str(workshop.model("gpt2", tokenizer=True)))
    assert base.tokenizer.decode(base.tokenizer("the quick fox")["input_ids"]) == "the quick fox"


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_without_tokenizer_files_there_is_no_tokenizer(workshop, architecture):
    assert load_base_model(str(workshop.model(architecture))).tokenizer is None


def test_the_fingerprint_is_the_same_for_the_same_weights_in_shards(workshop, tmp_path):
    source = workshop.model("llama")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert print_of(tmp_path / "shards") == print_of(source)


def test_the_fingerprint_is_the_same_for_half_precision_weights_and_their_widened_copy(workshop, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(workshop.model("gpt2")).half()
    half.save_pretrained(tmp_path / "half")
    half.float().save_pretrained(tmp_path / "float")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "float")]
    assert sizes[1] > 1.8 * sizes[0]
    assert print_of(tmp_path / "half") == print_of(tmp_path / "float") != print_of(workshop.model("gpt2"))


def test_the_fingerprint_of_a_model_in_half_precision_is_that_of_its_widened_copy(workshop):
    half = AutoModelForCausalLM.from_pretrained(workshop.model("gpt2")).to(torch.bfloat16)
    narrow = fingerprint(half)
    assert narrow == fingerprint(half.float())


def test_the_fingerprint_differs_for_one_changed_weight(workshop, folder):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-6

    change_weights(folder, change)
    assert print_of(folder) != print_of(workshop.model("llama"))


def test_the_fingerprint_differs_for_another_model(workshop):
    assert print_of(workshop.model("llama", seed=1)) != print_of(workshop.model("llama"))


def test_tied_weights_count_once(workshop, tmp_path):
    source = workshop.model("gpt2")
    folder = Path(shutil.copytree(source, tmp_path / "twice"))
    change_weights(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert print_of(folder) == print_of(source)


def test_the_fingerprint_does_not_depend_on_names_or_order():
    first, second = torch.nn.ParameterDict(), torch.nn.ParameterDict()
    first["a"], first["b"] = torch.ones(2), torch.zeros(3)
    second["c"], second["d"] = torch.zeros(3), torch.ones(2)
    assert fingerprint(first) == fingerprint(second)
    second["d"] = torch.ones(2, 1)
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ("{", "not a valid JSON file"),
        ("[]", "model_type"),
        ("{}", "model_type"),
        ('{"model_type": "nope"}', "`nope`"),
        (None, "model_type"),
    ],
    ids=["cut off", "a list", "empty", "unknown", "missing"],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, config, found):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    message = refusal(tmp_path)
    assert "expected a Hub id or a folder with a config.json" in message
    assert found in message


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert "expected a Hub id or a folder with a config.json" in refusal(tmp_path / "nowhere")


def test_a_model_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 100, -1000])
def test_truncated_weights_are_refused(folder, kept):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "expected a causal language model that transformers can load" in refusal(folder)


def test_weights_that_are_missing_are_refused_and_not_made_up(folder):
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = refusal(folder)
    assert "expected all weights of LlamaForCausalLM, found 1 missing: model.layers.1.mlp.up_proj.weight" in message


def test_weights_of_another_shape_are_refused(folder):
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    refusal(folder)


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_pickled_weights_that_would_run_code_are_refused_and_do_not_run(folder, trap, save):
    (folder / "model.safetensors").unlink()
    if save == "torch":
        torch.save({"model.norm.weight": trap}, folder / "pytorch_model.bin")
    else:
        trap.set(folder / "pytorch_model.bin")
    refusal(folder)
    assert not trap.sprung


def test_code_that_comes_with_a_model_is_refused_and_does_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "custom code" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_tokenizer_is_refused(workshop, tmp_path):
    folder = Path(shutil.copytree(workshop.model("gpt2", tokenizer=True), tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{")
    assert "expected a tokenizer that transformers can load" in refusal(folder)


@pytest.mark.parametrize("length", [None, "long", 0])
def test_a_model_without_a_context_length_is_refused(folder, length):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": length}))
    assert "max_position_embeddings" in refusal(folder)


def test_an_encoder_decoder_is_refused_by_name(workshop):
    with pytest.raises(UnsupportedArchitectureError, match=r"expected a decoder-only .* found .*'t5'.*cross-attention"):
        load_base_model(str(workshop.model("t5")))


@pytest.fixture(scope="module")
def offline(workshop, tmp_path_factory):
    """What a fresh interpreter without a network says of a Hub id that is in the cache and of one that is not."""
    cache = tmp_path_factory.mktemp("cache") / "models--org--tiny"
    shutil.copytree(workshop.model("gpt2"), cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    shutil.copytree(workshop.model("gpt2", seed=1), cache / "snapshots" / "4567def")
    (cache / "refs" / "v1").write_text("4567def")
    script = (
        "from prefix_export.models import load_base_model\n"
        "for name in ('org/tiny', 'org/tiny@v1', 'org/tiny@4567def'):\n"
        "    base = load_base_model(name)\n"
        "    print(base.name, base.revision, base.fingerprint, base.tokenizer)\n"
        "try:\n    load_base_model('org/tiny@v2')\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
        "try:\n    load_base_model('org/nothing')\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache.parent)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return run.stdout.splitlines()


def test_a_hub_id_in_the_cache_is_loaded_offline(offline, base):
    assert offline[0] == f"org/tiny 0123abc {base.fingerprint} None"


def test_a_revision_in_the_cache_is_loaded_offline_and_its_commit_is_known(offline, workshop):
    other = load_base_model(str(workshop.model("gpt2", seed=1)))
    assert offline[1] == offline[2] == f"org/tiny 4567def {other.fingerprint} None"


def test_a_revision_that_is_not_in_the_cache_is_refused_in_one_line(offline):
    assert offline[3].startswith("ModelError model 'org/tiny@v2': expected a Hub id or a folder with a config.json")


def test_an_unknown_hub_id_is_refused_offline_in_one_line(offline):
    assert len(offline) == 5
    assert offline[4].startswith("ModelError model 'org/nothing': expected a Hub id or a folder with a config.json")


def test_rotary_positions_that_depend_on_the_length_are_refused_by_name(workshop):
    with pytest.raises(UnsupportedArchitectureError, match="found rope type 'dynamic'"):
        load_base_model(str(workshop.model("llama_dynamic")))


def test_longrope_is_limited_to_the_context_before_its_factors_change(workshop):
    base = load_base_model(str(workshop.model("phi3_longrope")))
    assert (base.geometry.context_length, base.model.config.max_position_embeddings) == (64, 320)
