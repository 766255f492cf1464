"""A baked bundle in transformers.js, in a real browser: the folder as `--target web` lays it out."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

import prefix_runtime
from tests.clients.conftest import DEMO, HERE, NEW_TOKENS, PROMPTS, TASKS, chromium, node, node_packages, run

pytestmark = pytest.mark.clients


def in_browser(bundle, dtype):
    """Token ids and text for each prompt."""
    command = [node(), HERE / "transformers_js.mjs", node_packages(), chromium(), bundle, dtype]
    return json.loads(run(command, input=json.dumps(PROMPTS), timeout=300))


@pytest.mark.parametrize("task", TASKS)
def test_tokens_are_pefts(bundle_of, peft_answers, task):
    found = in_browser(bundle_of(task, mode="bake", target="web", precision="fp32"), "fp32")
    assert [answer["ids"] for answer in found] == [peft_answers(task, [prompt])[0] for prompt in PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    assert [answer["text"] for answer in found] == [
        tokenizer.decode(answer["ids"], skip_special_tokens=True) for answer in found
    ]


def test_tokens_of_grouped_queries_are_pefts(bundle_of, peft_answers, grouped):
    found = in_browser(bundle_of("p20", mode="bake", target="web", precision="fp32", source=grouped), "fp32")
    assert [answer["ids"] for answer in found] == [peft_answers("p20", [each], source=grouped)[0] for each in PROMPTS]


def test_eight_bits_answer_as_in_the_runtime(bundle_of):
    bundle = bundle_of("json", mode="bake", target="web")
    engine = prefix_runtime.load(bundle)
    expected = [engine.generate(prompt, task="json", max_new_tokens=NEW_TOKENS).token_ids for prompt in PROMPTS]
    assert [tuple(answer["ids"]) for answer in in_browser(bundle, "q8")] == expected
