"""Graphs in standard operators, as a client runs them that knows nothing of prefixes: against PEFT, padding too."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import prefix_runtime
from prefix_export.build.folding import _check_one_base
from prefix_export.build.recipe import BuildRequest, build
from prefix_export.errors import ExportError
from prefix_export.trace.prefix_bank import PrefixBank
from prefix_runtime import Bundle, BundleError, LayerPrefix, Prefix, RequestError
from tests.workshop import with_families

LENGTHS = (3, 20)
TOLERANCE = 1e-4
VOCAB = 384
# Tied weights and learned positions; rotary, grouped queries; a window that a prefix of 20 partly falls out of.
ARCHITECTURES = ("gpt2", "opt", "llama", "mistral_windowed")


@pytest.fixture(scope="module", params=with_families(ARCHITECTURES[:1], ARCHITECTURES[1:]))
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def peft_model(workshop, architecture):
    """PEFT's model of a task, by its length."""

    def load(length):
        model = workshop.model(architecture)
        base = AutoModelForCausalLM.from_pretrained(model)
        return PeftModel.from_pretrained(base, workshop.adapter(model, length)).eval()

    return load


@pytest.fixture(scope="module")
def bank(workshop, architecture):
    return Bundle.open(workshop.bundle(architecture, LENGTHS, mode="bake"))


@pytest.fixture(scope="module")
def single(workshop, architecture):
    return Bundle.open(workshop.bundle(architecture, LENGTHS[1:], mode="bake"))


class Client:
    """What any client does: an empty past first, then what came back; positions from the mask."""

    def __init__(self, bundle):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(bundle.graph_path, options, providers=["CPUExecutionProvider"])
        self.layers = bundle.manifest.geometry.layers

    def run(self, ids, mask, past=None, **more):
        ids, mask = np.asarray(ids, np.int64), np.asarray(mask, np.int64)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        past = past or {
            f"past_key_values.{index}.{part}": np.zeros(
                (len(ids), layer.key_value_heads, 0, layer.head_dim), np.float32
            )
            for index, layer in enumerate(self.layers)
            for part in ("key", "value")
        }
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past, **more}
        names = [output.name for output in self.session.get_outputs()]
        logits, *present = self.session.run(None, feeds)
        return logits, dict(
            zip((name.replace("present", "past_key_values") for name in names[1:]), present, strict=True)
        )

    def greedy(self, ids, mask, steps, **more):
        logits, past = self.run(ids, mask, **more)
        found = [logits[:, -1].argmax(1)]
        mask = np.asarray(mask)
        while len(found) < steps:
            mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], 1)
            logits, past = self.run(found[-1][:, None], mask, past, **more)
            found.append(logits[:, -1].argmax(1))
        return np.stack(found, 1)


def padded(rows):
    length = max(map(len, rows))
    ids = [[0] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return ids, mask


def rows_of(count, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(1, VOCAB, size=3 + 4 * row).tolist() for row in range(count)]


def peft_logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()


def peft_tokens(model, ids, mask, steps):
    found = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
    )
    return found[:, len(ids[0]) :].numpy()


def test_a_client_gets_the_prefix_tuned_answers(single, peft_model):
    row = rows_of(4)[-1]
    ids, mask = [row], [[1] * len(row)]
    client, model = Client(single), peft_model(LENGTHS[1])
    np.testing.assert_allclose(client.run(ids, mask)[0], peft_logits(model, ids, mask), rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(client.greedy(ids, mask, 12), peft_tokens(model, ids, mask, 12))


def test_left_padded_rows_too(single, peft_model, architecture):
    ids, mask = padded(rows_of(3))
    client, model = Client(single), peft_model(LENGTHS[1])
    found = client.greedy(ids, mask, 12)
    if architecture == "mistral_windowed":
        # PEFT's padding lies between prefix and text and pushes the prefix out of the window; here it does not count.
        for row, tokens in zip(rows_of(3), found, strict=True):
            np.testing.assert_array_equal(tokens[None], peft_tokens(model, [row], [[1] * len(row)], 12))
        return
    logits = client.run(ids, mask)[0]
    for row, seen in enumerate(np.array(mask, bool)):
        # Of each row alone: PEFT's forward pass, unlike its `generate`, counts padding into the positions.
        expected = peft_logits(model, [rows_of(3)[row]], [[1] * seen.sum()])[0]
        np.testing.assert_allclose(logits[row][seen], expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(found, peft_tokens(model, ids, mask, 12))


def test_rows_of_one_batch_belong_to_different_tasks(bank, peft_model):
    rows = rows_of(4)
    ids, mask = padded(rows)
    tasks = [0, 1, 1, 0]
    found = Client(bank).greedy(ids, mask, 10, task_id=np.array(tasks))
    for task, length in enumerate(int(name[1:]) for name in bank.tasks):
        model = peft_model(length)
        for row in (index for index, other in enumerate(tasks) if other == task):
            np.testing.assert_array_equal(found[row][None], peft_tokens(model, [rows[row]], [[1] * len(rows[row])], 10))


def test_baked_and_fed_agree(workshop, single, architecture):
    fed = prefix_runtime.load(workshop.bundle(architecture, LENGTHS), threads=1)
    baked = prefix_runtime.load(single.root, threads=1)
    (task,) = baked.tasks
    ids = rows_of(1)[0]
    np.testing.assert_allclose(baked.logits(ids, task), fed.logits(ids, task), atol=TOLERANCE)
    left, right = (engine.generate(token_ids=ids, task=task, max_new_tokens=12) for engine in (baked, fed))
    assert left.token_ids == right.token_ids


@pytest.mark.parametrize("task_id", [2, -1, 2**40])
def test_a_task_id_out_of_range_is_an_error(bank, task_id):
    with pytest.raises(Exception, match="out of data bounds"):
        Client(bank).run([[1, 2], [3, 4]], [[1, 1], [1, 1]], task_id=np.array([0, task_id]))


def test_the_graph_is_of_standard_operators_and_passes_the_full_check(bank, single):
    for bundle in (bank, single):
        onnx.checker.check_model(bundle.graph_path, full_check=True)
        proto = onnx.load(bundle.graph_path, load_external_data=False)
        assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
        assert {entry.domain for entry in proto.opset_import} == {""}


def test_inputs_and_outputs_are_those_of_the_plain_model(bank, single):
    def named(bundle):
        inputs = [value.name for value in Client(bundle).session.get_inputs()]
        return [name for name in inputs if not name.startswith("past_key_values.")]

    assert named(single) == ["input_ids", "attention_mask", "position_ids"]
    assert named(bank) == [*named(single), "task_id"]
    task_id = onnx.load(bank.graph_path, load_external_data=False).graph.input[-1]
    assert (task_id.name, task_id.doc_string) == ("task_id", "0: p20, 1: p3")


def test_only_the_logits_that_are_asked_for_come_back(single):
    whole, _ = Client(single).run([[1, 2, 3]], [[1, 1, 1]])
    last, _ = Client(single).run([[1, 2, 3]], [[1, 1, 1]], num_logits_to_keep=np.array(1))
    assert (whole.shape, last.shape) == ((1, 3, VOCAB), (1, 1, VOCAB))
    np.testing.assert_allclose(last[:, 0], whole[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"precision": "fp16"}, 5e-2),
        pytest.param({"precision": "int8"}, None, marks=pytest.mark.families),
        pytest.param({"opset": 18}, TOLERANCE, marks=pytest.mark.families),
    ],
)
def test_other_precisions_and_opsets_agree(workshop, options, tolerance):
    bundle = Bundle.open(workshop.bundle("llama", LENGTHS, mode="bake", **options))
    onnx.checker.check_model(bundle.graph_path, full_check=True)
    found = bundle.manifest.parity["tasks"]["p20"]
    assert found["greedy_tokens_equal"]
    assert found["error"] <= (tolerance or TOLERANCE)
    if options.get("precision") == "int8":
        proto = onnx.load(bundle.graph_path, load_external_data=False)
        linear = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
        assert len(linear) == 7 * 3 + 2, "every linear layer of three, the output projection and the embedding"


@pytest.mark.families
def test_a_graph_for_the_web_is_one_file_where_transformers_js_looks(workshop):
    bundle = Bundle.open(workshop.bundle("llama", LENGTHS[1:], mode="bake", target="web"))
    assert bundle.manifest.graph == "onnx/model_quantized.onnx"
    assert [path.name for path in (bundle.root / "onnx").iterdir()] == ["model_quantized.onnx"]
    proto = onnx.load(bundle.graph_path)
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert prefix_runtime.load(bundle.root).generate("the quick", task="p20", max_new_tokens=3).token_ids


@pytest.mark.parametrize("options", [{"target": "portable"}, {"mode": "bake"}], ids=["portable", "baked"])
def test_buffers_are_used_again(workshop, options):
    engine = prefix_runtime.load(workshop.bundle("llama", LENGTHS, **options), threads=1)
    rows, tasks = rows_of(3), ["p20", "p3", "p20"]

    def answers():
        results = engine.generate(token_ids=rows, task=tasks, max_new_tokens=[3, 9, 6])
        return [result.token_ids for result in results]

    before = answers()
    abandoned = engine.stream(token_ids=rows[0], task="p3", max_new_tokens=9)
    next(abandoned)
    abandoned.close()
    assert answers() == before
    alone = [
        engine.generate(token_ids=row, task=task, max_new_tokens=count).token_ids
        for row, task, count in zip(rows, tasks, [3, 9, 6], strict=True)
    ]
    assert alone == before


class TestBank:
    def prefix(self, length, seed=0):
        arrays = np.random.default_rng(seed).normal(size=(2, 2, 4, length, 8)).astype(np.float32)
        return Prefix(
            {"decoder": tuple(LayerPrefix(*pair) for pair in arrays)}, position_base=length if length > 2 else 0
        )

    def test_shorter_prefixes_end_where_the_longest_does(self):
        prefixes = {"b": self.prefix(5), "a": self.prefix(2, 1)}
        bank = PrefixBank.of(prefixes)
        assert (bank.tasks, bank.longest) == (("a", "b"), 5)
        assert bank.lengths.tolist() == [2, 5]
        assert bank.position_bases.tolist() == [0, 5]
        assert bank.seen.tolist() == [[False] * 3 + [True] * 2, [True] * 5]
        for index, (keys, values) in enumerate(bank.layers):
            for place, task in enumerate(bank.tasks):
                length = prefixes[task].prefix_length
                layer = prefixes[task].sites["decoder"][index]
                np.testing.assert_array_equal(keys[place, :, 5 - length :], layer.key)
                np.testing.assert_array_equal(values[place, :, 5 - length :], layer.value)
                assert not keys[place, :, : 5 - length].any()


def trained_on(workshop, folder, *bases):
    """Adapters that name these base models, by task: t0, t1 and so on."""
    adapters = {f"t{index}": folder / f"t{index}" for index in range(len(bases))}
    for base, adapter in zip(bases, adapters.values(), strict=True):
        shutil.copytree(workshop.adapter(workshop.model(), 3), adapter)
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return adapters


class TestRefused:
    def test_a_graph_without_prefixes_to_bake(self, workshop, tmp_path):
        with pytest.raises(
            ExportError, match="mode bake: expected at least one prefix to put into the graph, found none"
        ):
            build(BuildRequest(str(workshop.model()), {}, tmp_path / "out", mode="bake"))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "bases", [("left/gpt2", "right/gpt2"), ("gpt2", "distilgpt2"), ("gpt2", "someone/other")], ids=" and ".join
    )
    def test_prefixes_of_different_base_models(self, workshop, tmp_path, bases):
        adapters = trained_on(workshop, tmp_path, *bases)
        request = BuildRequest(str(workshop.model()), adapters, tmp_path / "out", mode="bake")
        message = (
            f"of one base model, found '{bases[0]}' (task 't0'), '{bases[1]}' (task 't1'); bake those of each model"
        )
        with pytest.raises(ExportError, match=re.escape(message)):
            build(request)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "metadata",
        [
            ({"base_folder": "left"}, {"base_folder": "right"}),
            ({"base_model": "gpt2"}, {"base_folder": "right"}),
            ({"base_model": "gpt2"}, {"base_model": "openai-community/gpt2"}),
            ({"base_model": "gpt2"}, {}),
        ],
    )
    def test_names_that_may_be_of_one_model_are_no_refusal(self, metadata):
        layer = LayerPrefix(*np.zeros((2, 1, 1, 8), np.float32))
        prefixes = [Prefix({"decoder": (layer,)}, position_base=1, metadata=each) for each in metadata]
        _check_one_base(dict(zip("ab", prefixes, strict=True)))

    def test_another_folders_name_is_a_doubt_and_no_refusal(self, workshop, tmp_path):
        # A copy of a model is the model, whatever its folder is called.
        adapters = {f"t{seed}": workshop.adapter(workshop.model(seed=seed), 3) for seed in (0, 1)}
        request = BuildRequest(str(workshop.model()), adapters, tmp_path / "out", mode="bake", verify=False)
        (warning,) = [line for line in build(request).warnings if "trained on" in line]
        assert "'gpt2-1', not on 'gpt2-0'" in warning

    def test_no_task_for_the_runtime(self, bank):
        engine = prefix_runtime.load(bank.root)
        with pytest.raises(RequestError, match="task: expected one of those that the graph holds, p20, p3, found none"):
            engine.generate(token_ids=[1, 2])

    def test_tasks_that_come_or_go(self, bank):
        engine = prefix_runtime.load(bank.root)
        prefix = bank.prefix("p3")
        for change in (
            lambda: engine.add_task("new", prefix),
            lambda: engine.remove_task("p3"),
            lambda: bank.add_task("new", prefix),
            lambda: bank.remove_task("p3"),
        ):
            with pytest.raises(BundleError, match="found one whose graph holds them; build it anew"):
                change()
        assert engine.tasks == ("p20", "p3")
