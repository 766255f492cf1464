"""`fold`, `compose` and `inspect` as they are typed: what they write and print, and one line for what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import MultitaskPromptTuningConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from prefix_export import formats
from prefix_export.cli.main import main
from prefix_export.models import load_base_model
from prefix_export.prefixes.fold import fold_text
from prefix_runtime import Prefix
from tests.export.conftest import read_prefix
from tests.export.test_fold import save_adapter
from tests.export.test_formats_hostile import SEEDS, write


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def fail(*arguments):
    lines = run(*arguments, code=1).stderr.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def model(workshop):
    return workshop.model("gpt2", tokenizer=True)


@pytest.fixture(scope="module")
def adapter(workshop, model):
    return workshop.adapter(model, 3)


@pytest.fixture(scope="module")
def multitask(model, tmp_path_factory):
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3)
    return save_adapter(AutoModelForCausalLM.from_pretrained(model), config, tmp_path_factory.mktemp("multitask"))


class TestFold:
    def test_an_adapter_becomes_a_prefix_file_that_a_bundle_takes(self, model, adapter, tmp_path):
        result = run("fold", adapter, "--model", model, "--output", tmp_path / "own.safetensors")
        assert "prefix of length 3 for decoder (3 layers); text from position 3" in result.output
        prefix = Prefix.load(tmp_path / "own.safetensors")
        assert prefix == read_prefix(adapter, load_base_model(str(model)).shape)

    def test_a_text_is_folded_from_the_command_line_and_from_a_file(self, model, tmp_path):
        (tmp_path / "text.txt").write_text("the quick fox", encoding="utf-8")
        run("fold", "--text", "the quick fox", "--model", model, "--output", tmp_path / "a")
        run("fold", "--text-file", tmp_path / "text.txt", "--model", model, "--output", tmp_path / "b")
        expected = fold_text("the quick fox", load_base_model(str(model)))
        assert Prefix.load(tmp_path / "a") == Prefix.load(tmp_path / "b") == expected

    def test_several_prefixes_become_a_folder_or_those_that_are_named(self, model, multitask, tmp_path):
        run("fold", multitask, "--model", model, "--output", tmp_path / "all")
        assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
            f"{task}.safetensors" for task in range(3)
        ]
        run("fold", multitask, "--model", model, "--part", "1", "--output", tmp_path / "one.safetensors")
        assert Prefix.load(tmp_path / "one.safetensors") == Prefix.load(tmp_path / "all" / "1.safetensors")
        run("fold", multitask, "--model", model, "--part", "1", "--part", "2", "--output", tmp_path / "two")
        assert names(tmp_path / "two") == ["1.safetensors", "2.safetensors"]
        assert "part '9': expected one of 0, 1, 2" in fail(
            "fold", multitask, "--model", model, "--part", "9", "--output", tmp_path / "none"
        )
        assert not (tmp_path / "none").exists()

    def test_exactly_one_source_is_asked_for(self, model, adapter, tmp_path):
        for sources in ([], [adapter, "--text", "fox"]):
            result = run("fold", *sources, "--model", model, "--output", tmp_path / "x", code=2)
            assert "expected one of SOURCE, --text and --text-file" in result.stderr

    def test_a_text_is_of_no_format(self, model, tmp_path):
        result = run("fold", "--text", "fox", "--format", "peft", "--model", model, "--output", tmp_path / "x", code=2)
        assert "--format goes with SOURCE; a text has no format" in result.stderr

    def test_what_is_there_is_not_written_over(self, model, adapter, tmp_path):
        (tmp_path / "mine").write_text("precious")
        assert "expected nothing there yet" in fail("fold", adapter, "--model", model, "--output", tmp_path / "mine")
        assert (tmp_path / "mine").read_text() == "precious"

    def test_a_source_that_is_nowhere_is_told(self, model, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        line = fail("fold", tmp_path / "nowhere", "--model", model, "--output", tmp_path / "x")
        assert "expected a trained prefix, a file or a folder, found nothing there" in line

    def test_text_that_is_no_text_is_refused(self, model, tmp_path):
        (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00")
        line = fail("fold", "--text-file", tmp_path / "text.txt", "--model", model, "--output", tmp_path / "x")
        assert "expected text in UTF-8" in line


class TestCompose:
    @pytest.fixture
    def files(self, model, adapter, workshop, tmp_path):
        paths = []
        for name, source in (
            ("a", adapter),
            ("b", workshop.adapter(model, 3, seed=1)),
            ("c", workshop.adapter(model, 5)),
        ):
            paths.append(tmp_path / f"{name}.safetensors")
            run("fold", source, "--model", model, "--output", paths[-1])
        return paths

    def test_one_after_another(self, files, tmp_path):
        result = run("compose", *files, "--output", tmp_path / "all.safetensors")
        assert "prefix of length 11 for decoder" in result.output
        assert Prefix.load(tmp_path / "all.safetensors").position_base == 11

    def test_their_average(self, files, tmp_path):
        run("compose", *files[:2], "--average", "--weight", 3, "--weight", 1, "--output", tmp_path / "mean.safetensors")
        key, left, right = (
            Prefix.load(path).sites["decoder"][0].key for path in (tmp_path / "mean.safetensors", *files[:2])
        )
        np.testing.assert_allclose(key, 0.75 * left + 0.25 * right, atol=1e-6)

    def test_what_makes_no_sense_is_one_line(self, files, tmp_path):
        line = fail("compose", *files, "--average", "--output", tmp_path / "x")
        assert "average: expected prefixes of one length, found 3, 5" in line
        assert "expected at least two prefixes" in fail("compose", files[0], "--output", tmp_path / "x")
        result = run("compose", *files[:2], "--weight", 1, "--output", tmp_path / "x", code=2)
        assert "--weight: expected --average with it" in result.stderr
        assert not (tmp_path / "x").exists()


class TestTrainingRuns:
    @pytest.fixture(scope="class")
    @classmethod
    def state_dict(cls, model, tmp_path_factory):
        """A state dict of the adapters `default` and `support`, in a checkpoint of a run."""
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        wrapped.add_adapter("support", config)
        out = tmp_path_factory.mktemp("out")
        (out / "checkpoint-7").mkdir()
        torch.save(wrapped.state_dict(), out / "checkpoint-7/pytorch_model.bin")
        return out

    def test_a_part_of_a_state_dict_is_folded(self, model, state_dict, tmp_path):
        one = run("fold", state_dict, "--model", model, "--part", "support", "--output", tmp_path / "one")
        assert "prefix of length 4 for decoder (3 layers)" in one.output
        assert f"warning: {state_dict}: read checkpoint-7, the only trained prefix in it" in one.stderr
        run("fold", state_dict, "--model", model, "--output", tmp_path / "all")
        assert names(tmp_path / "all") == ["default.safetensors", "support.safetensors"]
        assert Prefix.load(tmp_path / "all/support.safetensors") == Prefix.load(tmp_path / "one")
        line = fail("fold", state_dict, "--model", model, "--part", "none", "--output", tmp_path / "x")
        assert "part 'none': expected one of default, support" in line

    def test_inspect_says_which_file_it_read(self, state_dict):
        told = json.loads(run("inspect", state_dict, "--json").output)
        assert (told["file"], told["adapters"]) == ("checkpoint-7/pytorch_model.bin", "default, support")
        assert told["support: kind"] == "PREFIX_TUNING or PROMPT_TUNING"


class TestInspect:
    def test_a_checkpoint_and_how_it_would_fold(self, model, multitask):
        plain = json.loads(run("inspect", multitask, "--json").output)
        assert (plain["format"], plain["kind"], plain["tasks"]) == ("PEFT adapter", "MULTITASK_PROMPT_TUNING", "3")
        shown = json.loads(run("inspect", multitask, "--model", model, "--json").output)
        assert shown["folds to 2"].startswith("prefix of length 4 for decoder (3 layers); text from position 4")

    @pytest.fixture(scope="class")
    @classmethod
    def configurations(cls, tmp_path_factory):
        """Folders with nothing but a configuration, for the shapes of `SEEDS`."""
        side = {f"{each}_{what}": 2 if what == "attention_heads" else 1 for each in ("encoder", "decoder")
                for what in ("layers", "attention_heads")}  # fmt: skip
        found = {
            "gpt2": transformers.GPT2Config(n_embd=4, n_head=2, n_layer=1),
            "bart": transformers.BartConfig(d_model=4, **side),
            "bert": transformers.BertConfig(hidden_size=4, num_attention_heads=2, num_hidden_layers=1),
        }
        root = tmp_path_factory.mktemp("configurations")
        for name, config in found.items():
            config.save_pretrained(root / name)
        return root

    @pytest.mark.parametrize("family", sorted(SEEDS.keys() - {"soft-prompt"}))
    def test_each_family_is_told_and_folded_by_a_configuration_alone(self, configurations, tmp_path, family):
        content, configs, shape = SEEDS[family]
        path = write(tmp_path, content, configs, "zip")
        shown = json.loads(run("inspect", path, "--model", configurations / shape.name, "--json").output)
        reader, _ = formats.find_reader(path)
        assert shown["format"] == ("prefix file" if family == "canonical" else reader.TITLE)
        assert len(shown) > 2, "it says nothing of what is in it"
        folds = [text for name, text in shown.items() if name.startswith("folds to")]
        assert len(folds) == (3 if family == "control-prefixes" else 1)
        assert all(text.startswith("prefix of length 2 for ") for text in folds)
        named = json.loads(run("inspect", path, "--format", reader.NAME, "--json").output)
        assert named == {name: text for name, text in shown.items() if not name.startswith(("folds to", "warning"))}

    def test_a_soft_prompt_is_told_and_folded_by_its_model(self, model, tmp_path):
        np.save(tmp_path / "prompt.npy", np.ones((5, 64), np.float32))
        shown = json.loads(run("inspect", tmp_path / "prompt.npy", "--model", model, "--json").output)
        assert (shown["format"], shown["prefix length"], shown["width"]) == ("one array alone", "5", "64")
        assert shown["folds to"].startswith("prefix of length 5 for decoder (3 layers); text from position 5")

    def test_a_format_that_is_named_overrules(self, adapter):
        line = fail("inspect", adapter, "--format", "p-tuning-v2")
        assert "expected a tensor 'prefix_encoder.embedding.weight', found tensors 'prompt_embeddings'" in line

    def test_a_pickle_of_li_and_liangs(self, tmp_path):
        torch.save({"wte.weight": torch.ones(5, 64), "control_trans.0.weight": torch.ones(2, 2)}, tmp_path / "x.pt")
        shown = json.loads(run("inspect", tmp_path / "x.pt", "--json").output)
        assert shown["format"] == "Li & Liang prefix tuning"
        assert shown["wte.weight"] == "5 x 64"

    def test_warnings_are_shown(self, model, adapter, tmp_path):
        tensor = torch.randn(3, 384)
        save_file({"prompt_embeddings": tensor.repeat(60, 1)}, tmp_path / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"num_virtual_tokens": 180}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
        shown = json.loads(run("inspect", tmp_path, "--model", model, "--json").output)
        warnings = [text for name, text in shown.items() if name.startswith("warning")]
        assert any("trained on 'org/other'" in text for text in warnings)
        assert any("takes 180 of 320 positions" in text for text in warnings)

    def test_untrained_numbers_are_noticed(self, model, workshop):
        noise = workshop.adapter(model, 50)  # torch.nn.init.normal_, as PEFT begins
        shown = json.loads(run("inspect", noise, "--model", model, "--json").output)
        assert any("distribution that torch.nn.Embedding begins with" in str(text) for text in shown.values())
