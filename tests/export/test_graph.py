"""The exported graph: the contract that other people's clients rely on, and transformers' own answers."""

from __future__ import annotations

import logging
import site
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForCausalLM

import prefix_export
from prefix_export.errors import ExportError
from prefix_export.graph import contract
from prefix_export.graph.export import export_graph
from prefix_export.trace.attention import probe
from prefix_export.trace.decoder import FastDecoder

VOCAB_SIZE = 384
TOLERANCE = 1e-4
# Grouped queries and weights of its own for the output; multi-head attention and tied weights.
GEOMETRY = {"llama": (2, 16), "gpt2": (4, 16)}


@pytest.fixture(scope="module", params=GEOMETRY)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(workshop, architecture):
    return AutoModelForCausalLM.from_pretrained(workshop.model(architecture)).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    export_graph(FastDecoder(model, probe(model), torch.float32), 320, folder / "model.onnx", opset=21)
    return folder


@pytest.fixture(scope="module")
def proto(folder):
    return onnx.load(folder / "model.onnx", load_external_data=False)


@pytest.fixture(scope="module")
def session(folder):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def described(value):
    tensor = value.type.tensor_type
    axes = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return value.name, onnx.TensorProto.DataType.Name(tensor.elem_type), axes


def key_values(name, heads, head_dim):
    axes = ["batch_size", heads, "past_sequence_length", head_dim]
    return [(f"{name}.{layer}.{part}", "FLOAT", axes) for layer in range(3) for part in ("key", "value")]


def test_inputs_are_those_of_the_contract_in_order(proto, architecture):
    assert [described(value) for value in proto.graph.input] == [
        ("input_ids", "INT64", ["batch_size", "sequence_length"]),
        ("attention_mask", "INT64", ["batch_size", "total_sequence_length"]),
        ("position_ids", "INT64", ["batch_size", "sequence_length"]),
        *key_values("past_key_values", *GEOMETRY[architecture]),
        ("num_logits_to_keep", "INT64", []),
    ]


def test_outputs_are_those_of_the_contract_in_order(proto, architecture):
    assert [described(value) for value in proto.graph.output] == [
        ("logits", "FLOAT", ["batch_size", "logits_length", VOCAB_SIZE]),
        *key_values("present", *GEOMETRY[architecture]),
    ]


def test_the_graph_passes_onnx_full_check(folder, tmp_path):
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    onnx.shape_inference.infer_shapes_path(
        folder / "model.onnx", tmp_path / "inferred.onnx", check_type=True, strict_mode=True
    )


def test_attention_is_one_operator_a_layer_and_nothing_else_is_foreign(proto):
    foreign = [(node.domain, node.op_type) for node in proto.graph.node if node.domain]
    assert foreign == [("com.microsoft", "GroupQueryAttention")] * 3
    assert {(entry.domain, entry.version) for entry in proto.opset_import} == {("", 21), ("com.microsoft", 1)}
    assert not proto.functions


def test_nothing_of_the_machine_is_in_the_graph(folder, workshop):
    content = (folder / "model.onnx").read_bytes()
    repository = Path(prefix_export.__file__).parents[1]
    for trace in (repository, *site.getsitepackages(), Path.home(), workshop.root, 'File "', ".py", "stack_trace"):
        assert str(trace).encode() not in content


def test_every_weight_is_stored_once(folder, model):
    unique = sum(parameter.nbytes for parameter in model.parameters())
    assert (folder / "model.onnx.data").stat().st_size == pytest.approx(unique, rel=0.05)


def test_weights_lie_outside_of_the_graph(folder, proto):
    inside = [
        (tensor.name, len(tensor.raw_data))
        for tensor in proto.graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
    ]
    # onnx-ir leaves up to 256 bytes in place: a bias of 64 numbers.
    assert all(size <= 256 for _, size in inside)
    locations = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"model.onnx.data"}
    assert (folder / "model.onnx").stat().st_size < 40_000
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]


def past(architecture, batch, capacity):
    shape = (batch, GEOMETRY[architecture][0], capacity, GEOMETRY[architecture][1])
    # What is not filled must never be read: numbers that would show.
    return {name: np.full(shape, 1e3, np.float32) for name, *_ in key_values("past_key_values", 0, 0)}


def run(session, ids, lengths, buffers, keep=0, total=None):
    """Logits, and the buffers with the new tokens [batch, sequence] appended to rows that are filled so far."""
    ids = np.array(ids, np.int64)
    sequence = ids.shape[1]
    positions = np.array(lengths)[:, None] + np.arange(sequence)
    filled = np.array(lengths) + sequence
    mask = (np.arange(total or filled.max()) < filled[:, None]).astype(np.int64)
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.astype(np.int64)}
    logits, *present = session.run(None, {**feed, **buffers, "num_logits_to_keep": np.array(keep, np.int64)})
    return logits, dict(zip(buffers, present, strict=True))


def expected_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


IDS = np.random.default_rng(5).integers(1, VOCAB_SIZE, size=40).tolist()


@pytest.mark.parametrize(("keep", "kept"), [(0, 9), (1, 1), (2, 2), (9, 9)])
def test_as_many_logits_are_kept_as_are_asked_for(session, model, architecture, keep, kept):
    logits, _ = run(session, [IDS[:9]], [0], past(architecture, 1, 16), keep)
    assert logits.shape == (1, kept, VOCAB_SIZE)
    np.testing.assert_allclose(logits[0], expected_logits(model, IDS[:9])[-kept:], rtol=0, atol=TOLERANCE)


def test_a_prefill_onto_a_past_continues_it(session, model, architecture):
    _, buffers = run(session, [IDS[:12]], [0], past(architecture, 1, 40))
    logits, _ = run(session, [IDS[12:30]], [12], buffers)
    np.testing.assert_allclose(logits[0], expected_logits(model, IDS[:30])[12:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("total", [None, 32], ids=["mask as long as the longest row", "mask as long as the buffer"])
def test_ragged_rows_decode_together_as_they_do_alone(session, model, architecture, total):
    prompts = [IDS[:7], IDS[10:31]]
    rows = [run(session, [prompt], [0], past(architecture, 1, 32))[1] for prompt in prompts]
    together = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    lengths = [len(prompt) for prompt in prompts]
    for step in ([3, 9], [250, 1]):
        logits, together = run(session, [[token] for token in step], lengths, together, total=total)
        for row, token in enumerate(step):
            alone, rows[row] = run(session, [[token]], [lengths[row]], rows[row])
            np.testing.assert_allclose(logits[row], alone[0], rtol=0, atol=1e-5)
            prompts[row] = [*prompts[row], token]
            np.testing.assert_allclose(logits[row, 0], expected_logits(model, prompts[row])[-1], rtol=0, atol=TOLERANCE)
        lengths = [length + 1 for length in lengths]


def test_the_filled_part_of_the_past_is_not_written_again(session, architecture):
    _, buffers = run(session, [IDS[:5]], [0], past(architecture, 1, 16))
    _, after = run(session, [IDS[5:6]], [5], buffers)
    for name, buffer in buffers.items():
        np.testing.assert_array_equal(after[name][:, :, :5], buffer[:, :, :5])
        np.testing.assert_array_equal(after[name][:, :, 6:], buffer[:, :, 6:])
        assert np.abs(after[name][:, :, 5]).max() < 100


def test_a_graph_with_another_number_of_attention_operators_is_refused(folder):
    loaded = ir.load(folder / "model.onnx")
    with pytest.raises(ExportError, match="expected 4 GroupQueryAttention nodes, found 3"):
        contract.check_attention(loaded, 4)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "position_ids"])
def test_a_graph_with_other_axes_is_refused_by_input(folder, name):
    loaded = ir.load(folder / "model.onnx")
    value = next(value for value in loaded.graph.inputs if value.name == name)
    value.shape = ir.Shape(["batch", value.shape[1]])
    with pytest.raises(ExportError, match=rf"input {name}: expected axes \[batch_size, .*found \[batch, "):
        contract.check_axes(loaded)


def test_a_model_that_torch_cannot_trace_is_refused_by_name(model, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise torch.onnx.errors.OnnxExporterError("deep inside") from RuntimeError("data-dependent\nand more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError) as caught:
        export_graph(FastDecoder(model, probe(model), torch.float32), 64, tmp_path / "model.onnx", opset=21)
    assert str(caught.value) == f"{type(model).__name__}: torch.onnx cannot trace the model: data-dependent"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("folder")
def test_the_export_leaves_the_exporters_logging_as_it_was():
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    assert logger.level == logging.NOTSET


def test_no_metadata_is_left_on_nodes_and_values(proto):
    left = [node.name for node in proto.graph.node if node.metadata_props or node.doc_string]
    left += [value.name for value in (*proto.graph.value_info, *proto.graph.input) if value.metadata_props]
    assert not left
    assert not proto.metadata_props
    assert not proto.graph.metadata_props
