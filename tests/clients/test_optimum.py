"""A baked bundle in optimum, which knows nothing of prefixes: PEFT's tokens, greedily, by a beam, and in a batch."""

from __future__ import annotations

import json
from functools import partial

import pytest

import prefix_runtime
from tests.clients.conftest import DEMO, NEW_TOKENS, PROMPTS, TASKS, ask, python_of

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def python():
    return python_of("optimum")


def check(bundle, python, expected):
    found = ask(python, "optimum_client.py", bundle, json.dumps(PROMPTS), NEW_TOKENS)
    assert found["greedy"] == [expected([prompt])[0] for prompt in PROMPTS]
    assert found["beam"] == [expected([prompt], num_beams=3)[0] for prompt in PROMPTS]
    assert found["batch"] == expected(PROMPTS)


@pytest.mark.parametrize("task", TASKS)
def test_tokens_are_pefts(bundle_of, peft_answers, python, task):
    check(bundle_of(task, mode="bake"), python, partial(peft_answers, task))


def test_tokens_of_grouped_queries_are_pefts(bundle_of, peft_answers, python, grouped):
    bundle = bundle_of("p20", mode="bake", source=grouped)
    check(bundle, python, partial(peft_answers, "p20", source=grouped))


def test_a_graph_that_optimum_exported_becomes_a_bundle(bundle_of, peft_answers, python, tmp_path):
    folder = ask(python, "optimum_export.py", DEMO / "model", tmp_path / "exported")
    bundle = bundle_of(*TASKS, graph=tmp_path / "exported" / "model.onnx")
    assert folder == str(tmp_path / "exported")
    engine = prefix_runtime.load(bundle)
    for task in TASKS:
        found = [engine.generate(prompt, task=task, max_new_tokens=NEW_TOKENS).token_ids for prompt in PROMPTS]
        assert found == [tuple(peft_answers(task, [prompt])[0]) for prompt in PROMPTS]
