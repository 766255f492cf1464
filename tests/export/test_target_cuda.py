"""Graphs for a GPU, as far as a CPU can tell: greedy steps that feed themselves, and how few nodes there are.

onnxruntime runs float16 on a CPU by casts; that a build for `cuda` is verified at all shows that it agrees with PEFT.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

import prefix_runtime
from prefix_export.build import BuildRequest, build
from prefix_export.build.random_bundle import build_random
from prefix_export.errors import ExportError
from prefix_export.graph.export import export_graph
from prefix_export.models import cast_weights
from prefix_export.models.random_model import random_base_model
from prefix_export.trace.attention import probe
from prefix_export.trace.cuda_decoder import CudaDecoder
from prefix_export.verify import all_tasks as verification
from prefix_runtime import Bundle, ProviderError
from prefix_runtime.bundle.graph_contract import NEXT_INPUTS
from tests.workshop import CONFIGS, VOCAB_SIZE

LENGTH, ROOM, NEW = 20, 64, 8
NORM = {"gpt2": "SkipLayerNormalization", "opt": "SkipLayerNormalization"}
# Of a layer, without its two norms and its attention.
LAYER = {
    "gpt2": {"MatMul": 4, "Add": 1, "FastGelu": 1},
    "opt": {"MatMul": 4, "Add": 2, "Relu": 1},
    "llama": {"MatMul": 5, "QuickGelu": 1, "Mul": 1},
    "gemma": {"MatMul": 5, "FastGelu": 1, "Mul": 1},
}


@pytest.fixture(scope="module")
def bundle_of(workshop, tmp_path_factory):
    """Makes verified bundles of one task, each once; what is held out is little, as quality is not what is tested."""
    folder = tmp_path_factory.mktemp("cuda")
    held = folder / "held.txt"
    held.write_text("the quick brown fox\njumps over\n")
    made = {}

    def make(architecture):
        if architecture not in made:
            model = workshop.model(architecture, tokenizer=True)
            prefixes = {"p20": workshop.adapter(model, LENGTH)}
            request = BuildRequest(str(model), prefixes, folder / architecture, target="cuda", held_out={None: held})
            made[architecture] = build(request).bundle
        return made[architecture]

    return make


@pytest.fixture
def small(tmp_path):
    """A folder with the configuration of one layer of GPT-2, whose vocabulary is no multiple of 8."""
    folder = tmp_path / "small"
    folder.mkdir()
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64, "vocab_size": 77}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    return folder


def graph_of(folder):
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


def peft_tokens(workshop, architecture, prompt):
    folder = workshop.model(architecture, tokenizer=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tuned = PeftModel.from_pretrained(model, workshop.adapter(folder, LENGTH)).eval()
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


class FedBack:
    """A graph's greedy decoding, of which nothing but the token is looked at."""

    def __init__(self, folder):
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.past = {value.name: value for value in self.session.get_inputs() if value.name.startswith("past")}

    def run(self, feed):
        names = [value.name for value in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, feed), strict=True))
        kept = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        return kept, found

    def prefill(self, prefix, prompt, kept_logits):
        """The outputs behind a prompt, whose mask ends with it."""
        length = prefix.prefix_length if prefix is not None else 0
        past = {}
        for name, value in self.past.items():
            _, index, part = name.split(".")
            past[name] = np.zeros((1, value.shape[1], ROOM, value.shape[3]), np.float16)
            if prefix is not None:
                past[name][0, :, :length] = getattr(prefix.sites["decoder"][int(index)], part)
        return self.run(
            past
            | {
                "input_ids": np.array([prompt]),
                "attention_mask": np.ones((1, length + len(prompt)), np.int64),
                "position_ids": np.arange(length, length + len(prompt))[None],
                "num_logits_to_keep": np.array(kept_logits),
            }
        )


def check_layers(graph, architecture):
    nodes = [node.op_type for node in graph.node]
    attended = [index for index, kind in enumerate(nodes) if kind == "GroupQueryAttention"]
    assert len(attended) > 1
    norm = NORM.get(architecture, "SkipSimplifiedLayerNormalization")
    # Nodes come in the order in which they run: from one attention to the next it is a layer.
    for first, last in itertools.pairwise(attended):
        assert Counter(nodes[first:last]) == {**LAYER[architecture], norm: 2, "GroupQueryAttention": 1}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_steps_outputs_are_the_next_steps_inputs(workshop, bundle_of, architecture):
    bundle = bundle_of(architecture)
    prompt, graph = [5, 17, 300, 2, 9], FedBack(bundle.root)
    filled = LENGTH + len(prompt)
    kept, found = graph.prefill(bundle.prefix("p20"), prompt, kept_logits=1)
    tokens = [found["next_input_ids"].item()]
    assert found["next_position_ids"].tolist() == [[filled]]
    # For decode steps the mask has the buffer's length.
    mask = (np.arange(ROOM) <= filled).astype(np.int64)[None]
    feed = {
        "input_ids": found["next_input_ids"],
        "position_ids": found["next_position_ids"],
        "attention_mask": mask,
        "num_logits_to_keep": np.array(1),
    }
    while len(tokens) < NEW:
        kept, found = graph.run(kept | feed)
        assert found["next_input_ids"].item() == int(found["logits"][0, -1].argmax())
        feed |= {name.removeprefix("next_"): found[name] for name in NEXT_INPUTS}
        tokens.append(found["next_input_ids"].item())
    assert feed["position_ids"].tolist() == [[filled + NEW - 1]]
    np.testing.assert_array_equal(feed["attention_mask"][0], np.arange(ROOM) < filled + NEW)
    assert tokens == peft_tokens(workshop, architecture, prompt)


@pytest.mark.parametrize("kept_logits", [0, 1, 3, 5])
def test_the_next_inputs_are_of_the_last_position_however_many_logits_are_kept(bundle_of, kept_logits):
    bundle = bundle_of("gpt2")
    graph, prompt = FedBack(bundle.root), [5, 17, 300, 2, 9]
    _, every = graph.prefill(bundle.prefix("p20"), prompt, 0)
    _, found = graph.prefill(bundle.prefix("p20"), prompt, kept_logits)
    assert found["logits"].dtype == np.float32
    np.testing.assert_array_equal(found["logits"], every["logits"][:, -kept_logits:])
    for name in NEXT_INPUTS:
        np.testing.assert_array_equal(found[name], every[name])
    np.testing.assert_array_equal(found["next_attention_mask"], np.ones((1, 25)))


def test_the_runtime_runs_a_float16_bundle_on_a_cpu(workshop, bundle_of):
    bundle = bundle_of("gpt2")
    engine = prefix_runtime.load(bundle.root, threads=1)
    prompt = [5, 17, 300, 2, 9]
    result = engine.generate(token_ids=prompt, task="p20", max_new_tokens=NEW, ignore_end=True)
    assert list(result.token_ids) == peft_tokens(workshop, "gpt2", prompt)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_layer_is_as_few_nodes_as_there_are_kernels_for(bundle_of, architecture):
    check_layers(graph_of(bundle_of(architecture).root), architecture)


@pytest.mark.parametrize("architecture", ["opt", "gemma"])
def test_so_is_a_layer_whose_rows_are_joined_or_whose_norms_are_rounded_last(tmp_path, architecture):
    kind, sizes = CONFIGS[architecture]
    config = getattr(transformers, kind)(vocab_size=VOCAB_SIZE, **{**sizes, "num_hidden_layers": 2})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "q_proj" not in name:  # those stay zero, for torch to store them once
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.tensor([list(range(40, 73))])
    expected = model(ids).logits[0].detach().numpy()
    cast_weights(model, torch.float16)
    export_graph(CudaDecoder(model, probe(model), torch.float16), 320, tmp_path / "model.onnx", opset=21)
    check_layers(graph_of(tmp_path), architecture)
    _, found = FedBack(tmp_path).prefill(None, ids[0].tolist(), 0)
    np.testing.assert_allclose(found["logits"][0], expected, rtol=0, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_tied_table_and_every_weight_are_stored_once_in_16_bits(workshop, bundle_of, architecture):
    bundle = bundle_of(architecture)
    model = AutoModelForCausalLM.from_pretrained(workshop.model(architecture, tokenizer=True))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert bundle.manifest.files["model.onnx.data"].size == pytest.approx(2 * numbers, rel=0.1)


def test_nodes_between_a_size_and_what_it_is_for_take_a_size_each(bundle_of):
    """By which onnxruntime leaves them on the CPU, where `Slice` and `GroupQueryAttention` read their results."""
    graph = graph_of(bundle_of("llama").root)
    made_by = {name: node for node in graph.node for name in node.output}
    wanted = [node.input[1] for node in graph.node if node.op_type == "Slice" and node.input[1] in made_by]
    wanted += [node.input[6] for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert wanted
    while wanted:
        node = made_by[wanted.pop()]
        if node.op_type != "Shape":
            sizes = [name for name in node.input if name in made_by]
            assert sizes, f"{node.op_type} takes no size"
            wanted += sizes


def test_int4_multiplies_and_looks_up_in_float16_with_rows_as_the_kernels_take_them(small, tmp_path):
    base = random_base_model(str(small))
    base.model.save_pretrained(tmp_path / "model")
    request = BuildRequest(str(tmp_path / "model"), {}, tmp_path / "out", target="cuda", precision="int4")
    built = build(request)  # verified: the rows that are more are not among the logits
    graph = graph_of(built.bundle.root)
    kinds = Counter(node.op_type for node in graph.node)
    assert (kinds["MatMulNBits"], kinds["GatherBlockQuantized"], kinds["MatMul"]) == (5, 1, 0)
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    rows = []
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            assert types[node.input[2]] == onnx.TensorProto.FLOAT16
            assert len(node.input) == 3, "the bias is for what follows"
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            assert (attributes["bits"], attributes["block_size"]) == (4, 32)
            assert "accuracy_level" not in attributes
            rows.append(attributes["N"])
    assert rows == [96, 32, 128, 32, 128]
    assert prefix_runtime.load(built.bundle.root).logits([1, 2, 3]).shape == (3, 77)


def test_a_random_bundle_has_the_tasks_that_are_asked_for(small, tmp_path):
    bundle = build_random(BuildRequest(str(small), {}, tmp_path / "out", target="cuda"), 2, 4).bundle
    assert (bundle.tasks, bundle.prefix("t1").prefix_length) == (("t0", "t1"), 4)
    assert bundle.prefix("t0").sites["decoder"][0].key.dtype == np.float16
    assert bundle.manifest.parity is None
    assert len(prefix_runtime.load(bundle.root).generate(token_ids=[1], task="t1", max_new_tokens=3).token_ids) == 3


def test_bfloat16_is_for_a_gpu_alone(small, tmp_path):
    bundle = build_random(BuildRequest(str(small), {}, tmp_path / "out", target="cuda", precision="bf16"), 1, 4).bundle
    graph = graph_of(bundle.root)  # the build has had it checked by onnx
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types["logits"] == onnx.TensorProto.FLOAT
    caches = {kind for name, kind in types.items() if name.startswith(("past", "present"))}
    weights = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    assert caches == weights == {onnx.TensorProto.BFLOAT16}
    assert bundle.manifest.cache == "bf16"
    assert bundle.prefix("t0").sites["decoder"][0].key.dtype == np.float32
    with pytest.raises(ProviderError, match=r"expected cuda for a bundle in bfloat16.*build it with --precision fp16"):
        prefix_runtime.load(bundle.root)


def test_bfloat16_is_not_verified_without_a_gpu(tmp_path):
    with pytest.raises(ExportError, match=r"expected a GPU and onnxruntime-gpu.*--no-verify"):
        build(BuildRequest("nowhere", {}, tmp_path / "out", target="cuda", precision="bf16"))


def test_the_yardstick_is_the_frameworks_own_error_in_float16(bundle_of):
    found = bundle_of("gpt2").manifest.parity["tasks"]["p20"]
    assert 1e-4 < found["yardstick"] < 5e-2
    assert found["error"] <= found["limit"] == pytest.approx(max(1e-3, 4 * found["yardstick"]))


def test_a_gpu_verifies_where_there_is_one(monkeypatch):
    monkeypatch.setattr(verification, "check_provider", lambda _: None)
    verification.check_can_run("bf16")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"precision": "fp32"}, "target cuda: precision: expected one of fp16, bf16, int4, int8, found 'fp32'"),
        ({"cache": "int8"}, "target cuda, precision fp16: cache: expected one of fp16, found 'int8'"),
        ({"mode": "bake"}, "target cuda: mode: expected feed, found 'bake'"),
    ],
)
def test_what_it_does_not_offer_is_refused_before_the_model_is_loaded(tmp_path, choice, message):
    with pytest.raises(ExportError, match=message):
        build(BuildRequest("nowhere", {}, tmp_path / "out", target="cuda", **choice))


def test_a_bundle_says_what_it_is_for(bundle_of):
    manifest = Bundle.open(bundle_of("gpt2").root).manifest
    found = (manifest.target, manifest.flavour, manifest.precision, manifest.cache)
    assert found == ("cuda", "fast", "fp16", "fp16")
