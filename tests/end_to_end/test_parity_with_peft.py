"""Every architecture and kind of graph against PEFT's own model: logits, and the tokens of its `generate`."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import prefix_runtime
from prefix_export.tensorrt.request import TensorRTEngineRequest
from prefix_export.tensorrt.tensorrt_engine import build_tensorrt_engine
from prefix_runtime import Bundle, BundleError, RequestError
from tests.workshop import with_families

ARCHITECTURES = (
    "gpt2",
    "opt",
    "gpt_neox",
    "gpt_bigcode",
    "llama",
    "qwen2",
    "qwen3",
    "phi3",
    "mistral",
    "mistral_windowed",
    "gemma",
    "stablelm",
    "granite",
)
KINDS = {"fast": {}, "portable": {"target": "portable"}, "baked": {"mode": "bake"}}
TOLERANCE = 1e-4
PROMPT = np.random.default_rng(1).integers(1, 384, size=45).tolist()

BUNDLES = {10: (10, 200), 200: (10, 200), 1: (1, 50), 50: (1, 50)}
"""For each prefix length those of the bundle that has it."""
TWICE = ("gpt2", "llama", "mistral_windowed")
"""Architectures whose other kinds of graphs `make test` has too; `make test-families` has all."""


def _cases():
    for architecture, kind, length in itertools.product(ARCHITECTURES, KINDS, BUNDLES):
        is_usual = length in BUNDLES[200] and (kind == "fast" or architecture in TWICE)
        marks = () if is_usual else pytest.mark.families
        yield pytest.param((architecture, kind, length), marks=marks, id=f"{architecture}-{kind}-{length}")


@pytest.fixture(scope="module", params=_cases())
def case(request):
    return request.param


@pytest.fixture(scope="module")
def architecture(case):
    return case[0]


@pytest.fixture(scope="module")
def kind(case):
    return case[1]


@pytest.fixture(scope="module")
def length(case):
    return case[2]


@pytest.fixture(scope="module")
def engine(workshop, architecture, kind, length):
    bundle = workshop.bundle(architecture, BUNDLES[length], tokenizer=False, **KINDS[kind])
    return prefix_runtime.load(bundle, threads=1)


@pytest.fixture(scope="module")
def peft_model(workshop, architecture, length):
    model = workshop.model(architecture)
    base = AutoModelForCausalLM.from_pretrained(model)
    return PeftModel.from_pretrained(base, workshop.adapter(model, length)).eval()


def peft_logits(model, token_ids):
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()


def peft_tokens(model, token_ids, new_tokens):
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return tuple(output[0, len(token_ids) :].tolist())


def peft_beams(model, token_ids, **options):
    """The texts of a beam search, and their scores."""
    ids = torch.tensor([token_ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return [tuple(row[len(token_ids) :]) for row in output.sequences.tolist()], output.sequences_scores.tolist()


@pytest.mark.parametrize("prompt", [PROMPT[:1], PROMPT], ids=["one token", "many tokens"])
def test_logits_equal_pefts(engine, peft_model, length, prompt):
    expected = peft_logits(peft_model, prompt)
    assert np.ptp(expected) > 1, "logits that hardly differ would prove nothing"
    np.testing.assert_allclose(engine.logits(prompt, f"p{length}"), expected, rtol=0, atol=TOLERANCE)


def test_the_prefix_changes_the_answer(engine, length):
    other = next(task for task in engine.tasks if task != f"p{length}")
    assert np.abs(engine.logits(PROMPT, f"p{length}") - engine.logits(PROMPT, other)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("prompt", [PROMPT[:1], PROMPT], ids=["one token", "many tokens"])
def test_greedy_tokens_equal_pefts(engine, peft_model, length, prompt):
    found = engine.generate(token_ids=prompt, task=f"p{length}", max_new_tokens=24)
    assert found.token_ids == peft_tokens(peft_model, prompt, 24)


@pytest.mark.parametrize("prompt", [PROMPT[:1], PROMPT], ids=["one token", "many tokens"])
def test_beams_equal_pefts(engine, peft_model, length, prompt):
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 20}
    found = engine.generate(token_ids=prompt, task=f"p{length}", **options).sequences
    texts, scores = peft_beams(peft_model, prompt, **options)
    assert [sequence.token_ids for sequence in found] == texts
    np.testing.assert_allclose([sequence.score for sequence in found], scores, rtol=0, atol=1e-5)


# The longest prefix reaches the end in the fewest steps.
@pytest.mark.parametrize("case", [case for case in _cases() if case.values[0][2] == max(BUNDLES)], indirect=True)
def test_greedy_tokens_equal_pefts_up_to_the_end_of_the_context(engine, peft_model, length):
    task = f"p{length}"
    room = engine.room(task) - len(PROMPT)
    found = engine.generate(token_ids=PROMPT, task=task, max_new_tokens=room)
    assert found.token_ids == peft_tokens(peft_model, PROMPT, room)
    assert len(found.token_ids) == room == 320 - length - len(PROMPT)


def test_decode_steps_give_the_logits_of_one_prefill(engine, length):
    # Prefill and decode steps are two paths through the operator: the past is read once and then appended to.
    task = f"p{length}"
    tokens = engine.generate(token_ids=PROMPT, task=task, max_new_tokens=16).token_ids
    logits = engine.logits([*PROMPT, *tokens[:-1]], task)[len(PROMPT) - 1 :]
    assert tuple(logits.argmax(-1).tolist()) == tokens


def test_rows_of_all_tasks_decode_together(engine, kind):
    tasks = [*engine.tasks, None, engine.tasks[0]] if kind != "baked" else [*engine.tasks, *engine.tasks]
    prompts = [PROMPT[: 7 * row + 1] for row in range(len(tasks))]
    found = engine.generate(token_ids=prompts, task=tasks, max_new_tokens=[9, 3, 12, 6])
    for row, (prompt, task) in enumerate(zip(prompts, tasks, strict=True)):
        alone = engine.generate(token_ids=prompt, task=task, max_new_tokens=len(found[row].token_ids))
        assert found[row].token_ids == alone.token_ids


def test_the_bare_model_equals_transformers(engine, workshop, architecture, kind):
    if kind == "baked":
        with pytest.raises(RequestError, match="task: expected one of those that the graph holds"):
            engine.logits(PROMPT)
        return
    model = AutoModelForCausalLM.from_pretrained(workshop.model(architecture)).eval()
    np.testing.assert_allclose(engine.logits(PROMPT), peft_logits(model, PROMPT), rtol=0, atol=TOLERANCE)


@pytest.mark.tensorrt
def test_tensorrt_builds_an_engine_of_the_same_graph_for_two_compute_capabilities(engine, kind, tmp_path):
    request = TensorRTEngineRequest(engine.bundle.root, tmp_path / "engines", compute_capabilities=("8.6", "12.0"))
    if kind == "fast":
        with pytest.raises(BundleError, match="expected a graph in standard operators"):
            build_tensorrt_engine(request)
        return
    record = build_tensorrt_engine(request).record
    assert record.compute_capabilities == ("8.6", "12.0")
    assert ("task_id" in {tensor.name for tensor in record.inputs}) == (kind == "baked")
    assert {profile.name for profile in record.profiles} == {"prefill", "decode"}


@pytest.mark.tensorrt
@pytest.mark.parametrize("architecture", with_families(TWICE[:1], [name for name in ARCHITECTURES if name != TWICE[0]]))
def test_tensorrt_builds_an_engine_of_weights_of_8_bits(workshop, architecture, tmp_path):
    # The graph was compared with PEFT's model of the rounded weights when the bundle was built.
    mode = ("feed", "bake")[ARCHITECTURES.index(architecture) % 2]  # either would take minutes more
    options = {"target": "tensorrt", "precision": "int8", "mode": mode, "max_length": 64}
    bundle = Bundle.open(workshop.bundle(architecture, (10,), tokenizer=False, **options))
    assert bundle.manifest.parity["tasks"]["p10"]["prompts"] > 1
    graph = onnx.load(bundle.graph_path, load_external_data=False).graph
    made_by = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in made_by]
    rounded = [node for node in products if made_by[node.input[1]].op_type == "DequantizeLinear"]
    assert len({node.input[0] for node in rounded}) == len(rounded) > 4
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}  # prefixes have more axes
    assert not [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in matrices]
    record = build_tensorrt_engine(
        TensorRTEngineRequest(bundle.root, tmp_path / "engines", compute_capabilities=("8.6", "12.0"))
    ).record
    assert {tensor.dtype for tensor in record.inputs if tensor.name.startswith("past")} == {"float16"}
