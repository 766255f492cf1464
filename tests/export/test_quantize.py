"""Weights in 8 and 4 bits: what they stand for, how they are packed, and the graph that multiplies with them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import prefix_runtime
from prefix_export.build.recipe import BuildRequest, build, verify_against
from prefix_export.errors import ExportError
from prefix_export.quantize.modules import QuantizedModel
from prefix_export.quantize.options import DEFAULT_BLOCK_SIZE, Quantization, quantization
from prefix_export.quantize.rounding import pack
from prefix_export.targets import TARGETS
from prefix_runtime import Bundle, Sampling
from prefix_runtime.cli.main import main
from tests.workshop import with_families

EACH = [
    Quantization(8, 32),
    Quantization(4, 32),
    Quantization(4, 16),
    Quantization(8, 64, "hqq"),
    Quantization(4, 32, "hqq"),
    Quantization(8, None),
]
each_settings = pytest.mark.parametrize("settings", EACH, ids=str)


@pytest.fixture
def weight():
    return torch.tensor(np.random.default_rng(0).normal(size=(24, 160)).astype(np.float32))


class TestPack:
    @each_settings
    def test_a_weight_is_off_by_little_more_than_a_step_at_most(self, weight, settings):
        packed = pack(weight, settings)
        step = packed.scales.abs().repeat_interleave(packed.block_size, 1)[:, :160]
        # A block's extreme may lie beyond the last step; hqq gives up extremes for what lies between.
        slack = 1.01 if settings.method == "rtn" else 3
        assert ((packed.dequantized() - weight).abs() <= slack * step).all()
        assert (packed.dequantized() - weight).abs().mean() < 0.3 * step.mean()

    @pytest.mark.parametrize("bits", [8, 4])
    def test_values_on_the_grid_come_back_as_they_are(self, bits):
        half = 2 ** (bits - 1)
        grid = torch.arange(-half, half).float().repeat(64 // (2 * half) + 1)[:64].repeat(3, 1)
        grid[:, ::32] = -half  # each block reaches its extreme, so that the step is 1
        torch.testing.assert_close(pack(grid, Quantization(bits, 32)).dequantized(), grid, rtol=0, atol=1e-5)

    @each_settings
    def test_a_weight_of_zeros_stays_zero(self, settings):
        assert not pack(torch.zeros(8, 64), settings).dequantized().any()

    @pytest.mark.parametrize(("inputs", "size"), [(128, 128), (192, 64), (96, 32), (40, 32), (7, 32)])
    def test_blocks_get_shorter_before_they_are_padded(self, inputs, size):
        packed = pack(torch.ones(4, inputs), Quantization(8, 128))
        assert packed.settings.block_size == size
        assert packed.scales.shape == (4, -(-inputs // size))
        assert packed.dequantized().shape == (4, inputs)

    @pytest.mark.parametrize("size", [1e-9, 1e-6, 1.0, 1e4])
    def test_the_scale_of_an_output_is_a_positive_number_of_float16(self, weight, size):
        packed = pack(weight * size, Quantization(8, None))
        assert packed.scales.shape == (24, 1)
        assert (packed.scales > 0).all()
        torch.testing.assert_close(packed.scales.half().float(), packed.scales, rtol=0, atol=0)
        # Half a step, what rounding the scale moves the last one by, and half of the smallest scale, 2^-24, 127 times.
        step = size * weight.abs().amax(1, keepdim=True) / 127
        assert ((packed.dequantized() - weight * size).abs() <= 0.57 * step + 4e-6).all()

    def test_hqq_errs_less_than_rounding(self, weight):
        skewed = weight.abs() ** 3
        errors = [
            (pack(skewed, Quantization(4, 32, method)).dequantized() - skewed).abs().mean() for method in ("rtn", "hqq")
        ]
        assert errors[1] < 0.9 * errors[0]


class TestSettings:
    def test_float_weights_are_left_alone(self):
        assert quantization("fp32", None, "rtn") is None

    @pytest.mark.parametrize(("size", "method"), [(32, "rtn"), (None, "hqq")])
    def test_where_outputs_have_scales_blocks_and_zero_points_are_refused(self, size, method):
        assert quantization("int8", None, "rtn", by_output=True) == Quantization(8, None)
        with pytest.raises(ExportError, match=r"^block size, quantizer: expected none and rtn for a target whose "):
            quantization("int8", size, method, by_output=True)

    @pytest.mark.parametrize("precision", ["int8", "int4"])
    def test_the_default_block_size(self, precision):
        assert quantization(precision, None, "rtn").block_size == 32 == DEFAULT_BLOCK_SIZE

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (("fp16", 32, "rtn"), "expected precision int8 or int4 with them, found fp16"),
            (("int8", 48, "rtn"), "block size: expected one of 16, 32, 64, 128, 256, found 48"),
            (("int8", 0, "rtn"), "block size: expected one of"),
            (("int4", None, "gptq"), "quantizer: expected one of rtn, hqq, found 'gptq'"),
            (("fp32", 32, "rtn"), "expected precision int8 or int4 with them, found fp32"),
            (("fp32", None, "hqq"), "expected precision int8 or int4 with them, found fp32"),
        ],
    )
    def test_what_there_is_not_is_refused(self, given, message):
        with pytest.raises(ExportError, match=message):
            quantization(*given)


class TestModel:
    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_a_model_keeps_its_modules_and_gets_rounded_weights(self, workshop, architecture):
        before, model = (AutoModelForCausalLM.from_pretrained(workshop.model(architecture)) for _ in range(2))
        quantized = QuantizedModel(model, Quantization(4, 32))
        with quantized.packed(TARGETS["cpu"]):
            assert type(model.get_output_embeddings()) is not torch.nn.Linear
        assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
        changed = {
            name
            for (name, one), other in zip(before.named_parameters(), model.parameters(), strict=True)
            if not torch.equal(one, other)
        }
        linear = {
            f"{name}.weight"
            for name, module in before.named_modules()
            if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        }
        embedding = {name for name, p in before.named_parameters() if p is before.get_input_embeddings().weight}
        assert changed == (linear & {name for name, _ in before.named_parameters()}) | embedding

    def test_tied_weights_stay_tied(self, workshop):
        model = AutoModelForCausalLM.from_pretrained(workshop.model())
        QuantizedModel(model, Quantization(8, 32))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("bits", "size"), [(8, DEFAULT_BLOCK_SIZE), (8, 64), (4, DEFAULT_BLOCK_SIZE)])
def test_a_row_is_multiplied_in_every_batch_as_it_is_alone(bits, size):
    # To the last bit, or a row of a batch could be sampled otherwise than alone; of longer blocks it is not so.
    random, inputs, outputs = np.random.default_rng(0), 512, 96
    weight = torch.tensor(random.standard_normal((outputs, inputs), np.float32))
    product = product_of(pack(weight, Quantization(bits, size)))
    rows = random.standard_normal((9, inputs), np.float32)
    (alone,) = zip(*(product.run(None, {"x": rows[row : row + 1]}) for row in range(9)), strict=True)
    for count in range(2, 10):
        (together,) = product.run(None, {"x": rows[:count]})
        np.testing.assert_array_equal(together, np.concatenate(alone[:count]))


def product_of(packed):
    """A session that multiplies "x", [rows, inputs] float32, with a weight as the graph does."""
    sizes = {"K": packed.inputs, "N": packed.outputs, "bits": packed.settings.bits, "block_size": packed.block_size}
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "values", "scales"], ["y"], domain="com.microsoft", accuracy_level=4, **sizes
    )
    inputs, result = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", packed.inputs), ("y", packed.outputs))
    )
    weights = [
        onnx.numpy_helper.from_array(packed.values.numpy(), "values"),
        onnx.numpy_helper.from_array(packed.scales.numpy(), "scales"),
    ]
    graph = onnx.helper.make_graph([node], "product", [inputs], [result], weights)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("precision", ["int8", "int4"])
class TestBundle:
    def test_every_linear_layer_is_packed_and_the_tied_table_stored_once(self, workshop, precision):
        bundle = workshop.bundle(precision=precision)
        graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
        kinds = [node.op_type for node in graph.node]
        assert "MatMul" not in kinds
        assert "Gemm" not in kinds
        assert kinds.count("MatMulNBits") == 3 * 4 + 1
        (gather,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
        (head,) = [node for node in graph.node if node.op_type == "MatMulNBits" and node.output[0] == "logits"]
        assert gather.input[0] == head.input[1]
        assert {attribute.i for attribute in head.attribute if attribute.name == "accuracy_level"} == {4}

    def test_sampled_rows_of_a_batch_are_the_rows_alone(self, workshop, precision):
        engine = prefix_runtime.load(workshop.bundle(precision=precision), threads=1, max_batch=8)
        prompts = [list(range(5, 6 + 3 * row)) for row in range(8)]
        tasks = [("p3", None, "p20")[row % 3] for row in range(8)]
        how = [Sampling(temperature=3, seed=row) for row in range(8)]
        together = engine.generate(token_ids=prompts, task=tasks, sampling=how, max_new_tokens=40, ignore_end=True)
        for row, prompt, task, sampling in zip(together, prompts, tasks, how, strict=True):
            alone = engine.generate(token_ids=prompt, task=task, sampling=sampling, max_new_tokens=40, ignore_end=True)
            assert row.token_ids == alone.token_ids

    def test_the_files_shrink(self, workshop, precision):
        sizes = [(workshop.bundle(precision=kind) / "model.onnx.data").stat().st_size for kind in ("fp32", precision)]
        assert sizes[1] < {"int8": 0.40, "int4": 0.30}[precision] * sizes[0]  # the table of positions stays as it is

    def test_the_manifest_says_so(self, workshop, precision):
        manifest = prefix_runtime.load(workshop.bundle(precision=precision)).bundle.manifest
        assert (manifest.precision, manifest.quantizer) == (precision, "rtn")
        assert manifest.block_size == DEFAULT_BLOCK_SIZE
        quality = manifest.parity["quality"]
        assert set(quality["tasks"]) == {"p3", "p20"}
        for result in (quality["bare_model"], *quality["tasks"].values()):
            assert {"int8": 0.9, "int4": 0.5}[precision] < result["greedy_agreement"] <= 1
            assert abs(result["perplexity"] / result["reference_perplexity"] - 1) < 0.2
            assert result["positions"] > 300

    def test_the_weights_of_a_step_are_counted(self, workshop, precision):
        folder = workshop.bundle(precision=precision)
        manifest = prefix_runtime.load(folder).bundle.manifest
        data = (folder / "model.onnx.data").stat().st_size
        positions = 320 * 64 * 4
        assert manifest.weight_bytes == pytest.approx(data - positions, rel=0.05)  # small constants lie in the graph

    def test_verify_rounds_the_model_as_build_did(self, workshop, precision):
        bundle = prefix_runtime.Bundle.open(workshop.bundle(precision=precision))
        parity = verify_against(bundle, str(workshop.model(tokenizer=True)))
        assert max(result.error for result in parity.values()) < 1e-4


def test_a_bundle_with_a_scale_for_each_output_says_so_and_is_verified_as_it_was_built(workshop):
    folder = workshop.bundle(target="tensorrt", precision="int8")
    bundle = Bundle.open(folder)
    assert (bundle.manifest.block_size, bundle.manifest.quantizer, bundle.manifest.cache) == (None, "rtn", "fp16")
    assert bundle.manifest.parity["quality"]["bare_model"]["greedy_agreement"] > 0.9
    parity = verify_against(bundle, str(workshop.model(tokenizer=True)))
    assert max(result.error for result in parity.values()) < 0.02
    said = CliRunner().invoke(main, ["inspect", str(folder)]).output
    assert "int8, by rtn with a scale for each output" in said


@pytest.mark.parametrize(
    "settings", with_families([{"quantizer": "hqq"}, {"cache": "int8"}], [{"block_size": 16}, {"cache": "fp16"}])
)
@pytest.mark.parametrize("architecture", with_families(["gpt2"], ["qwen3"]))
def test_other_settings_agree_with_the_source_framework_too(workshop, architecture, settings):
    bundle = prefix_runtime.Bundle.open(workshop.bundle(architecture, precision="int4", **settings))
    assert bundle.manifest.parity["bare_model"]["greedy_tokens_equal"]


def test_a_prefix_of_a_float16_cache_takes_half_the_bytes(workshop):
    bundle = Bundle.open(workshop.bundle(cache="fp16"))
    assert bundle.prefix("p20").dtype == np.float16
    whole = Bundle.open(workshop.bundle()).prefix("p20")
    np.testing.assert_allclose(
        bundle.prefix("p20").sites["decoder"][0].key, whole.sites["decoder"][0].key, rtol=1e-3, atol=1e-3
    )


def test_the_certificate_has_size_and_perplexity_change(workshop):
    bundle = Bundle.open(workshop.bundle(precision="int8"))
    quality = bundle.manifest.parity["quality"]
    assert quality["graph_bytes"] == sum(path.stat().st_size for path in bundle.root.glob("model.onnx*"))
    told = quality["tasks"]["p20"]
    assert told["perplexity_change"] == pytest.approx(told["perplexity"] / told["reference_perplexity"] - 1)


class TestRefused:
    def request(self, workshop, tmp_path, **fields):
        return BuildRequest(str(workshop.model(tokenizer=True)), {}, tmp_path / "bundle", **fields)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"precision": "int2"}, "target cpu: precision: expected one of fp32, int8, int4, found 'int2'"),
            ({"cache": "int4"}, "precision fp32: cache: expected one of fp32, fp16, int8, found 'int4'"),
            ({"precision": "int8", "block_size": 5}, "block size: expected one of"),
        ],
    )
    def test_nothing_is_left_behind(self, workshop, tmp_path, fields, message):
        with pytest.raises(ExportError, match=message):
            build(self.request(workshop, tmp_path, **fields))
        assert not list(tmp_path.iterdir())

    def test_held_out_text_for_a_task_that_is_not_built_is_refused(self, workshop, tmp_path):
        with pytest.raises(ExportError, match=r"expected one of the tasks that are built, found 'xsum'"):
            build(self.request(workshop, tmp_path, precision="int8", held_out={"xsum": tmp_path}))

    def test_a_missing_text_is_refused(self, workshop, tmp_path):
        with pytest.raises(ExportError, match=r"none\.txt: expected a text file, found none"):
            build(self.request(workshop, tmp_path, precision="int8", held_out={None: tmp_path / "none.txt"}))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, "expected weights or a cache to round and compare with float32, found none"),
            ({"precision": "int8", "verify": False}, "expected a comparison with float32 .*, found --no-verify"),
        ],
    )
    def test_text_that_nothing_is_compared_on_is_refused(self, workshop, tmp_path, fields, message):
        (tmp_path / "t.txt").write_text("the fox")
        with pytest.raises(ExportError, match=f"^held-out text: {message}$"):
            build(self.request(workshop, tmp_path, held_out={None: tmp_path / "t.txt"}, **fields))

    def test_a_small_context_is_enough(self, workshop, tmp_path):
        result = build(self.request(workshop, tmp_path, precision="int8", cache="int8", max_length=10))
        assert result.quality[None].positions > 0
        assert {path.stat().st_mode & 0o777 for path in result.bundle.root.glob("*.safetensors")} == {0o644}
