"""A baked bundle in onnxruntime-genai, by the configuration that `build` writes."""

from __future__ import annotations

import json

import pytest

from tests.clients.conftest import PROMPTS, TASKS, ask, python_of

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("task", TASKS)
def test_tokens_are_pefts(bundle_of, peft_answers, task):
    found = ask(python_of("genai"), "genai_client.py", bundle_of(task, mode="bake"), json.dumps(PROMPTS))
    assert found == [peft_answers(task, [prompt])[0] for prompt in PROMPTS]


def test_tokens_of_grouped_queries_are_pefts(bundle_of, peft_answers, grouped):
    bundle = bundle_of("p20", mode="bake", source=grouped)
    found = ask(python_of("genai"), "genai_client.py", bundle, json.dumps(PROMPTS))
    # It goes on to the end of the context.
    expected = [peft_answers("p20", [prompt], source=grouped)[0] for prompt in PROMPTS]
    assert [ids[: len(wanted)] for ids, wanted in zip(found, expected, strict=True)] == expected


def test_a_graph_of_several_tasks_has_no_configuration(bundle_of):
    # It knows no input by which a task could be chosen.
    assert not (bundle_of(*TASKS, mode="bake") / "genai_config.json").exists()
