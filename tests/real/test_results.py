"""The committed results of `examples/real/evaluate.py`: the table shows the figures; they are within the bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

REAL = Path(__file__).parents[2] / "examples" / "real"


@pytest.fixture(scope="module")
def results():
    return json.loads((REAL / "results.json").read_text(encoding="utf-8"))


def test_the_table_shows_the_figures(scripts, results):
    assert (REAL / "results.md").read_text(encoding="utf-8") == scripts.evaluate.as_markdown(results)


def test_every_contestant_ran_on_400_tables_per_task_at_least(scripts, results):
    assert results["held_out_tables"] >= 400
    assert set(results["contestants"]) == set(scripts.contestants.LABELS)


def test_the_adapters_are_the_committed_ones(committed_texts, results):
    committed = json.loads((REAL / "peft_texts.json").read_text(encoding="utf-8"))
    assert set(committed_texts) == set(committed["adapters"])
    assert results["adapters"] == committed["adapters"]


def test_float32_writes_every_text_that_peft_writes(results):
    for scores in results["contestants"]["fp32"]["tasks"].values():
        assert scores["equal_to_peft_percent"] == 100


@pytest.mark.parametrize("name", ["int8", "int8-128", "int8-cache"])
def test_int8_scores_as_peft_does(results, name):
    peft = results["contestants"]["peft"]["tasks"]
    for task, scores in results["contestants"][name]["tasks"].items():
        assert scores["exact_match_percent"] == pytest.approx(peft[task]["exact_match_percent"], rel=0, abs=1)
        assert scores["bleu"] == pytest.approx(peft[task]["bleu"], rel=0, abs=0.5)
