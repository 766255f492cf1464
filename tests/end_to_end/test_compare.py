"""The comparison with peers, on a tiny model, with the peers that need no environment of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients

COMPARE = Path(__file__).parents[2] / "examples" / "compare"
LENGTHS = ("0", "10")
PEERS = ("product-float32", "product-float32-4k", "product-text", "peft-eager", "peft-lora", "transformers-exporter")
NEW_TOKENS = 12


def run(script, *options):
    command = [sys.executable, str(COMPARE / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def table(folder):
    missing = ["--llama-python", folder / "nowhere"]
    options = ["--model", "tiny", "--prefix-lengths", *LENGTHS, "--peers", *PEERS, "llama-f32", *missing]
    sizes = ["--rounds", 1, "--new-tokens", NEW_TOKENS, "--threads", 1, "--selection-lengths", 2]
    return run("run.py", *options, *sizes, "--folder", folder, "--output", folder / "report.json")


@pytest.fixture(scope="module")
def report(table, folder):
    assert table.strip() == (folder / "report.md").read_text().strip()
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_gives_the_products_tokens(report, peer):
    lengths = report["contestants"][peer]["lengths"]
    assert set(lengths) == set(LENGTHS)
    assert all(figures["equal_tokens"] == NEW_TOKENS for figures in lengths.values())


def test_the_tokens_are_not_one_and_the_same(folder, report):
    import prefix_runtime

    engine = prefix_runtime.load(folder / "models" / "tiny" / "bundle-float32", threads=1)
    answers = [
        engine.generate(token_ids=[5, 6, 7], task=task, max_new_tokens=report["new_tokens"]).token_ids
        for task in (None, "p10")
    ]
    assert len(set(answers[0])) > 1, "tokens that never change would prove nothing"
    assert answers[0] != answers[1]


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_has_its_figures(report, peer):
    for figures in report["contestants"][peer]["lengths"].values():
        for field in ("first_token", "inter_token"):
            assert 0 < figures[field]["first"] <= figures[field]["median"] <= figures[field]["third"]
            assert figures[f"{field}, product over this"]["median"] > 0
        assert figures["resident_bytes"] > 1e6


def test_the_product_is_one_of_itself(report):
    for figures in report["contestants"]["product-float32"]["lengths"].values():
        assert figures["inter_token, product over this"] == {"first": 1, "median": 1, "third": 1}


def test_a_peer_that_cannot_be_had_says_why(report, table):
    assert "nowhere" in report["contestants"]["llama-f32"]["reason"]
    assert "| llama.cpp, F32 | not measured: " in table


def test_the_table_has_every_row_at_every_length(report, table):
    for length in LENGTHS:
        section = table.split(f"## Prefix length {length},")[1].split("\n## ")[0]
        for row in report["contestants"].values():
            assert f"| {row['label']} |" in section
    for name, row in report["contestants"].items():
        floors = [figures["inter_token over floor"] for figures in row.get("lengths", {}).values()]
        assert all((floor is not None) == name.startswith("product") for floor in floors)


def test_selection_among_tasks_is_measured(report):
    assert len(report["task selection"]) == 2
    for passes in report["task selection"].values():
        assert passes["later requests"]["median"] > 0


@pytest.mark.usefixtures("report")
def test_the_report_is_drawn(folder):
    run("plot.py", folder / "report.json", folder / "picture.png")
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_two_prefixes_take_less_than_two_merged_models(folder):
    options = ["--model", "tiny", "--prefix-length", 10, "--tasks", 2, "--threads", 1, "--folder", folder]
    run("footprint.py", *options, "--output", folder / "footprint.json")
    rows = json.loads((folder / "footprint.json").read_text())["rows"]
    disk = {row["way"].split()[0]: row["disk_bytes"] for row in rows if "float32" in row["way"]}
    assert set(disk) == {"LoRA", "merged", "prefixes"}
    assert disk["prefixes"] < disk["merged"]
    assert disk["LoRA"] < disk["merged"]


def test_a_batch_is_compared_with_its_rows(shared_bundle):
    options = ["--rows", 3, "--prefix-length", 4, "--rounds", 1, "--threads", 1]
    lines = run("batches.py", shared_bundle, *options).splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["one row", "3 rows of one task", "3 rows of 3 tasks"]
    assert all(float(line.split(": ")[1].split()[0]) > 0 for line in lines)


def test_session_options_are_compared_with_the_defaults(shared_bundle):
    table = run("session_options.py", shared_bundle, "--rounds", 1, "--threads", 1)
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in table.splitlines()[2:])}
    assert float(rows["defaults, again"][3].split()[0]) == 1
    assert {"no spinning", "no prepacking"} < set(rows)


def test_two_are_compared_in_turns(folder):
    names = ["product-float32", "peft-eager"]
    options = ["--model", "tiny", "--prefix-lengths", *LENGTHS, "--pairs", 6, "--new-tokens", 4, "--threads", 1]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in run("pairs.py", *names, *options, "--folder", folder).splitlines()
        if line.startswith(("| product", "| peft"))
    ]
    assert [row[:2] for row in rows] == [[name, length] for length in LENGTHS for name in names]
    for product, peer in zip(rows[::2], rows[1::2], strict=True):
        ratio, low, high = map(float, re.findall(r"\d+\.\d+", product[3]))
        assert 0 < low <= ratio <= high
        assert float(product[4].split()[0]) > 0
        assert (peer[3], peer[4]) == ("", "—")
