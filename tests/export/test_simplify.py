"""The simplified graph: what is gone from it, for which architectures, and that rotary tables are the model's own.

That it computes what the model computes is what `tests/end_to_end/test_parity_with_peft.py` shows for each of them.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from prefix_export.graph.export import export_graph
from prefix_export.trace.attention import probe
from prefix_export.trace.decoder import FastDecoder
from tests.workshop import CONFIGS, VOCAB_SIZE, layers_of


def graph_of(bundle):
    return onnx.load(bundle / "model.onnx").graph


def attention_of(graph):
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        *itertools.product(["gpt2", "llama", "gemma", "qwen2", "phi3"], ["fp32"]),
        *(
            pytest.param(name, "int8", marks=[] if name == "llama" else pytest.mark.families)
            for name in ("gpt2", "llama", "gemma", "qwen2")
        ),
    ],
)
def test_projections_are_packed(workshop, architecture, precision):
    bundle = (
        workshop.family(architecture) if precision == "fp32" else workshop.bundle(architecture, precision=precision)
    )
    graph = graph_of(bundle)
    kind = "MatMul" if precision == "fp32" else "MatMulNBits"
    projections = {"gpt2": 4, "phi3": 4}.get(architecture, 5)
    assert Counter(node.op_type for node in graph.node)[kind] == projections * layers_of(architecture) + 1
    assert all(not node.input[1] and not node.input[2] for node in attention_of(graph))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "granite"])
def test_attention_applies_rotary_positions_itself(workshop, architecture):
    graph = graph_of(workshop.family(architecture))
    for node in attention_of(graph):
        assert {attribute.i for attribute in node.attribute if attribute.name == "do_rotary"} == {1}
        assert node.input[9] == "position_ids"
    kinds = Counter(node.op_type for node in graph.node)
    assert not {"Neg", "Cos", "Sin"} & set(kinds)


def test_rotary_tables_are_the_models_own(workshop):
    bundle = workshop.bundle("llama")
    model = AutoModelForCausalLM.from_pretrained(workshop.model("llama", tokenizer=True))
    graph = graph_of(bundle)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    cosines, sines = (tensors[name] for name in attention_of(graph)[0].input[7:9])
    expected = model.model.rotary_emb(torch.zeros(1), torch.arange(320)[None])
    for table, full in zip((cosines, sines), expected, strict=True):
        np.testing.assert_allclose(table, full[0, :, :8].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["stablelm", "gpt_neox"])
def test_so_is_partial_rotation_and_queries_keys_and_values_of_each_head_beside_one_another(tmp_path, architecture):
    name, sizes = CONFIGS[architecture]
    # Heads of 64, of which 16 are rotated; grouped queries in StableLM.
    wide = {**sizes, "hidden_size": 256, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(vocab_size=VOCAB_SIZE, **wide)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    export_graph(FastDecoder(model, probe(model), torch.float32), 320, tmp_path / "model.onnx", opset=21)
    (node,) = attention_of(graph_of(tmp_path))
    assert {attribute.i for attribute in node.attribute if attribute.name == "do_rotary"} == {1}
    assert not node.input[1]
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    past = {value.name: np.zeros((1, value.shape[1], 32, 64), np.float32) for value in session.get_inputs()[3:5]}
    ids = np.arange(40, 57)[None]
    mask, positions = np.ones_like(ids), np.arange(5, 22)[None]
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "num_logits_to_keep": np.array(0)}
    expected = model(torch.from_numpy(ids), position_ids=torch.from_numpy(positions)).logits.detach()
    np.testing.assert_allclose(session.run(["logits"], past | given)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["stablelm", "gpt_neox"])
def test_rotation_of_less_than_the_operator_takes_stays_in_the_graph(workshop, architecture):
    graph = graph_of(workshop.family(architecture))
    assert not any(attribute.name == "do_rotary" for node in attention_of(graph) for attribute in node.attribute)
    assert not {node.domain for node in graph.node} - {"", "com.microsoft"}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma"])
def test_next_to_no_reshapes_are_left(workshop, architecture):
    kinds = Counter(node.op_type for node in graph_of(workshop.family(architecture)).node)
    assert kinds["Reshape"] <= 2
    assert kinds["Gemm"] == 0
