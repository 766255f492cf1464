"""The embedded default, from its committed files to text: what its README says of the scores holds on the runtime."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prefix_runtime
from prefix_export.build import BuildRequest, build

DEMO = Path(__file__).parents[2] / "examples" / "demo"
TASKS = ("describe", "headline", "json")
TABLES = 40


@pytest.fixture(scope="module")
def corpus():
    """The demo's own module, which makes held-out tables and what is right for them."""
    sys.path.insert(0, str(DEMO))
    try:
        spec = importlib.util.spec_from_file_location("corpus", DEMO / "corpus.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["corpus"] = module  # dataclasses look it up
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(DEMO))
        del sys.modules["corpus"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    prefixes = {task: DEMO / "prefixes" / task for task in TASKS}
    result = build(BuildRequest(str(DEMO / "model"), prefixes, tmp_path_factory.mktemp("demo") / "bundle"))
    assert result.warnings == ()
    return prefix_runtime.load(result.bundle.root, threads=1)


@pytest.fixture(scope="module")
def score(engine, corpus):
    """The part of held-out tables that are answered exactly right for one task under a prefix, or under none."""

    def measure(wanted, task):
        lights = corpus.held_out(TABLES)
        results = engine.generate([corpus.prompt(light) for light in lights], task=task)
        right = [corpus.TASKS[wanted](light) for light in lights]
        assert all(result.finish_reason == "end_token" for result in results) or task != wanted
        return sum(result.text.strip() == text.strip() for result, text in zip(results, right, strict=True)) / TABLES

    return measure


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_answered_right_under_its_own_prefix(score, task):
    assert score(task, task) >= 0.9


@pytest.mark.parametrize("task", TASKS)
def test_without_a_prefix_no_task_is_answered(score, task):
    assert score(task, None) <= 0.45


@pytest.mark.parametrize(("wanted", "task"), [("describe", "headline"), ("headline", "json"), ("json", "describe")])
def test_another_tasks_prefix_answers_another_task(score, wanted, task):
    assert score(wanted, task) <= 0.05


@pytest.mark.parametrize(
    ("options", "agreement", "lost"),
    [
        pytest.param({"precision": "int8"}, 0.99, 0, marks=pytest.mark.families),
        ({"precision": "int8", "cache": "int8"}, 0.99, 0),
        pytest.param({"precision": "int4"}, 0.97, 1, marks=pytest.mark.families),
    ],
    ids=["int8", "int8, keys and values too", "int4"],
)
def test_rounded_weights_answer_as_float32_does(tmp_path, corpus, score, options, agreement, lost):
    """By the certificate, and by tables answered right, of which so many may be lost."""
    prefixes = {task: DEMO / "prefixes" / task for task in TASKS}
    texts = {task: DEMO / "held_out" / f"{task}.txt" for task in TASKS}
    built = build(BuildRequest(str(DEMO / "model"), prefixes, tmp_path / "bundle", held_out=texts, **options))
    assert min(built.quality[task].greedy_agreement for task in TASKS) >= agreement
    lights = corpus.held_out(TABLES)
    engine = prefix_runtime.load(built.bundle.root, threads=1)
    for task in TASKS:
        results = engine.generate([corpus.prompt(light) for light in lights], task=task)
        right = sum(
            result.text.strip() == corpus.TASKS[task](light).strip()
            for result, light in zip(results, lights, strict=True)
        )
        assert right >= score(task, task) * TABLES - lost
    compare_sampled_rows(engine, [corpus.prompt(light) for light in lights[:8]])


def compare_sampled_rows(engine, prompts):
    """Rows of a batch are sampled as each is alone, though rounding makes the most of a digit that is another."""
    tasks = [TASKS[row % len(TASKS)] for row in range(len(prompts))]
    sampling = [prefix_runtime.Sampling(temperature=1.5, seed=row) for row in range(len(prompts))]
    rows = zip(prompts, tasks, sampling, strict=True)
    alone = [engine.generate(prompt, task=task, sampling=how).token_ids for prompt, task, how in rows]
    assert [row.token_ids for row in engine.generate(prompts, task=tasks, sampling=sampling)] == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.families
def test_rounded_bundles_are_scored():
    script = [sys.executable, str(DEMO / "evaluate_rounded.py"), "--tables", "2"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    assert rows[0] == ["build", *TASKS]
    assert {row[0] for row in rows[2:]} > {"float32", "int8", "int4"}
    assert all(cell == "100.0 % (100.0)" for row in rows[2:] for cell in row[1:])


def test_the_committed_scores_meet_what_the_demo_promises():
    scores = json.loads((DEMO / "results.json").read_text())["scores"]
    for task in TASKS:
        assert scores[task][task]["exact_match_percent"] >= 90
        assert scores["none"][task]["exact_match_percent"] <= 45


def test_streamed_text_has_no_partial_characters(engine, corpus):
    # Every animal's picture is two tokens.
    chunks = [
        chunk.text for light in corpus.held_out(10) for chunk in engine.stream(corpus.prompt(light), task="headline")
    ]
    assert not any("\ufffd" in chunk for chunk in chunks)
    assert any(ord(character) > 0xFFFF for chunk in chunks for character in chunk)


def test_the_demo_is_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 8e6


@pytest.mark.parametrize("path", sorted(DEMO.rglob("*config.json")), ids=lambda path: path.parent.name)
def test_no_configuration_names_a_folder_of_a_machine(path):
    assert not re.search(r'"[^"]*/[^"]*"', path.read_text(encoding="utf-8"))
