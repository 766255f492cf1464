"""Graphs that were exported before: used as they are where they keep the contract; what does not fit is named."""

from __future__ import annotations

import shutil
from dataclasses import replace

import onnx
import pytest

import prefix_runtime
from prefix_export.build import BuildRequest, build
from prefix_export.errors import ExportError, ParityError
from prefix_runtime import Bundle, PrefixMismatchError, ProviderError

FLOAT, HALF, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64


@pytest.fixture(scope="module")
def portable(workshop):
    """A graph of the model with the contract, and the model's folder."""
    return Bundle.open(workshop.bundle("gpt2", (3,), target="portable")).graph_path


@pytest.fixture
def request_of(workshop, tmp_path):
    model = workshop.model("gpt2", tokenizer=True)

    def request(graph, **options):
        prefixes = {"p20": workshop.adapter(model, 20)}
        return BuildRequest(str(model), prefixes, tmp_path / "out", graph=graph, **options)

    return request


@pytest.fixture
def changed(portable, tmp_path):
    """A copy of the graph that a function has changed."""

    def change(function):
        folder = tmp_path / "changed"
        folder.mkdir()
        for path in portable.parent.glob("model.onnx*"):
            shutil.copy(path, folder)
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        function(model.graph)
        onnx.save(model, folder / "model.onnx")
        return folder / "model.onnx"

    return change


def named(values, name):
    return next(value for value in values if value.name == name)


def test_a_graph_becomes_a_bundle_that_agrees_with_peft(portable, request_of):
    result = build(request_of(portable))
    assert result.parity["p20"].reference.startswith("peft")
    assert result.parity["p20"].agrees
    assert prefix_runtime.load(result.bundle.root).generate("the quick", task="p20", max_new_tokens=3).token_ids
    assert result.bundle.manifest.weight_bytes == Bundle.open(portable.parent).manifest.weight_bytes


def renamed(name):
    """An input and its uses under another name."""

    def change(graph):
        named(graph.input, name).name = "other"
        for node in graph.node:
            node.input[:] = ["other" if each == name else each for each in node.input]

    return change


def dequantized(graph):
    graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["w"], name="first"))
    graph.initializer.append(onnx.helper.make_tensor("q", onnx.TensorProto.INT8, [1], [1]))
    graph.initializer.append(onnx.helper.make_tensor("s", FLOAT, [], [1.0]))


def resized(name, axis, size):
    def change(graph):
        dim = named([*graph.input, *graph.output], name).type.tensor_type.shape.dim[axis]
        dim.Clear()
        dim.dim_value = size

    return change


def retyped(name, kind):
    def change(graph):
        named([*graph.input, *graph.output], name).type.tensor_type.elem_type = kind

    return change


def added(name):
    return lambda graph: graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, [1]))


def renamed_output(graph):
    graph.output.append(onnx.helper.make_tensor_value_info("other", FLOAT, None))
    graph.output.remove(named(graph.output, "present.2.value"))
    graph.output.remove(named(graph.output, "other"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (renamed("input_ids"), "expected an input input_ids, found attention_mask, other, past_key_values"),
        (renamed("past_key_values.2.key"), r"expected an input past_key_values\.2\.key, found "),
        (dequantized, "node 'first': expected weights in float32, found DequantizeLinear; export the graph before"),
        (added("use_cache_branch"), "input use_cache_branch: .*found an input that the runtime does not know"),
        (resized("past_key_values.1.key", 1, 3), r"past_key_values.1.key: expected shape \[\?, 4, \?, 16\], found"),
        (resized("present.0.value", 3, 32), r"present.0.value: expected shape \[\?, 4, \?, 16\], found"),
        (resized("logits", 2, 50257), r"logits: expected shape \[\?, \?, 384\], found \[\?, \?, 50257\]"),
        (resized("input_ids", 1, 1), r"input_ids: expected shape \[\?, \?\], found \[\?, 1\]"),
        (
            resized("past_key_values.0.key", 0, 1),
            r"past_key_values.0.key: expected shape \[\?, 4, \?, 16\], found \[1,",
        ),
        (retyped("past_key_values.0.key", HALF), "past_key_values.0.key: expected float, found float16"),
        (retyped("attention_mask", FLOAT), "attention_mask: expected int64, found float"),
        (renamed_output, "expected an output present.2.value, found logits, present.0.key"),
    ],
)
def test_what_breaks_the_contract_is_named(changed, request_of, tmp_path, function, message):
    with pytest.raises(ExportError, match=message):
        build(request_of(changed(function), verify=False))
    assert not (tmp_path / "out").exists()


def test_a_file_of_weights_that_is_cut_short_is_named(changed, request_of, tmp_path, capfd):
    path = changed(lambda graph: None)
    with path.with_name("model.onnx.data").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(
        ExportError, match=r"expected model\.onnx\.data of \d+ bytes or more, found 1000; copy it again"
    ):
        build(request_of(path))
    assert not (tmp_path / "out").exists()
    assert "onnxruntime" not in capfd.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("length", "many"), ("offset", "-8")])
def test_a_weight_whose_place_is_nonsense_is_an_error_in_one_line(changed, request_of, tmp_path, key, value):
    def misplace(graph):
        tensor = next(each for each in graph.initializer if each.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    with pytest.raises(ExportError, match=r"^graph \S+model\.onnx: .*expected .*, found [^\n]+$"):
        build(request_of(changed(misplace), verify=False))
    assert not (tmp_path / "out").exists()


def test_a_graph_of_another_model_is_told_by_its_past(workshop, request_of):
    fast = Bundle.open(workshop.bundle("llama", (3,))).graph_path
    with pytest.raises(ExportError, match=r"past_key_values.0.key: expected shape \[\?, 4, \?, 16\], found \[\?, 2"):
        build(request_of(fast, verify=False))


def test_a_graph_of_other_weights_does_not_agree(workshop):
    other = Bundle.open(workshop.bundle("gpt2", (), target="portable", tokenizer=False))
    model = workshop.model("gpt2", seed=1)
    with pytest.raises(ParityError):
        build(BuildRequest(str(model), {}, other.root.parent / "never", graph=other.graph_path))
    assert not (other.root.parent / "never").exists()


def foreign(graph):
    graph.node[0].domain = "com.microsoft"
    graph.node[0].op_type = "NoSuchOperator"


def test_a_graph_that_onnxruntime_does_not_run_is_named_itself(changed, request_of, tmp_path):
    path = changed(foreign)
    model = onnx.load(path, load_external_data=False)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"changed/model.onnx: expected one that onnxruntime runs, .*NoSuchOperator"):
        build(request_of(path, verify=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no graph", None])
def test_what_is_no_graph_is_refused_in_one_line(request_of, tmp_path, content):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=r"graph .*model.onnx: expected an ONNX") as caught:
        build(request_of(path))
    assert "\n" not in str(caught.value)


def test_weights_that_lead_out_of_the_graphs_folder_are_refused(changed, request_of):
    def lead_out(graph):
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../../../etc/passwd"

    with pytest.raises(ExportError, match="expected an ONNX model, whole with its weights"):
        build(request_of(changed(lead_out)))


@pytest.mark.parametrize("options", [{"mode": "bake"}, {"precision": "int8"}, {"opset": 21}, {"target": "web"}])
def test_a_graph_that_is_used_as_it_is_cannot_be_made_otherwise(portable, request_of, options):
    with pytest.raises(ExportError, match="for a graph that is used as it is"):
        build(request_of(portable, **options))


def counting_positions(graph):
    """Make a graph count positions by the past's length, as some exporters do, whatever a mask leaves out."""
    graph.input.remove(named(graph.input, "position_ids"))
    nodes = [
        onnx.helper.make_node("Shape", ["past_key_values.0.key"], ["past_length"], start=2, end=3),
        onnx.helper.make_node("Shape", ["input_ids"], ["new_length"], start=1, end=2),
        onnx.helper.make_node("Shape", ["input_ids"], ["ids_shape"]),
        onnx.helper.make_node("Add", ["past_length", "new_length"], ["whole_length"]),
        onnx.helper.make_node("Squeeze", ["past_length"], ["range_start"]),
        onnx.helper.make_node("Squeeze", ["whole_length"], ["range_end"]),
        onnx.helper.make_node("Constant", [], ["range_step"], value_int=1),
        onnx.helper.make_node("Range", ["range_start", "range_end", "range_step"], ["range"]),
        onnx.helper.make_node("Expand", ["range", "ids_shape"], ["position_ids"]),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def test_a_graph_whose_padded_rows_would_be_wrong_is_refused(changed, request_of, tmp_path):
    with pytest.raises(ParityError, match=r"expected the exported graph to agree with .* and different tokens"):
        build(request_of(changed(counting_positions)))
    assert not (tmp_path / "out").exists()


def test_a_graph_of_the_fast_flavour_is_refused(workshop, request_of, tmp_path):
    fast = Bundle.open(workshop.bundle("gpt2", (3,))).graph_path
    with pytest.raises((ParityError, ExportError, ProviderError)):
        build(request_of(fast))
    assert not (tmp_path / "out").exists()


def test_a_graph_that_counts_positions_takes_no_prefix_that_they_ignore(changed, request_of):
    bundle = build(replace(request_of(changed(counting_positions)), verify=False)).bundle
    engine = prefix_runtime.load(bundle.root)
    engine.add_task("still", replace(bundle.prefix("p20"), position_base=0))
    with pytest.raises(PrefixMismatchError, match="as the graph counts positions itself, found one"):
        engine.generate(token_ids=[5], task="still")


def test_a_folder_in_place_of_a_graph_is_told(portable, request_of):
    with pytest.raises(ExportError, match="expected an ONNX file, found a folder"):
        build(request_of(portable.parent))
