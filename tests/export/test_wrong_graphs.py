"""The certificate refuses a graph that is wrong in one place: a weight, a head's order, a position, a mask."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from prefix_export.errors import ParityError
from prefix_export.models import load_base_model
from prefix_export.prefixes.reference import PrefixSource, SourcedPrefixes
from prefix_export.progress import SILENT
from prefix_export.quantize.modules import QuantizedModel, as_exact
from prefix_export.quantize.options import quantization
from prefix_export.tokenizers.held_out import read_held_out
from prefix_export.verify.all_tasks import observe_all
from prefix_export.verify.parity import compare
from prefix_export.verify.yardstick import Arithmetic
from prefix_runtime import Bundle, Engine
from prefix_runtime.backends.onnxruntime.backend import OnnxRuntime
from prefix_runtime.backends.onnxruntime.session import Session

HEAD = 16  # of the test's Llama
HEADS = 4


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def expected(request, workshop):
    """A bundle of a precision, and what the source framework makes of it under the task p3."""
    bundle = Bundle.open(workshop.bundle("llama", precision=request.param))
    model = workshop.model("llama", tokenizer=True)
    base = load_base_model(str(model))
    if settings := quantization(request.param, None, "rtn"):
        QuantizedModel(base.model, settings)
    sourced = SourcedPrefixes({"p3": bundle.prefix("p3")}, {"p3": PrefixSource(workshop.adapter(model, 3))})
    texts = {"p3": read_held_out(None, base, sourced.prefixes["p3"], 320)}
    found = observe_all(base, sourced, texts, Arithmetic(), max_length=320, progress=SILENT)
    return bundle, found["p3"]


def attention(graph):
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]


def changed(graph, name, change):
    (tensor,) = (each for each in graph.initializer if each.name == name)
    array = np.array(onnx.numpy_helper.to_array(tensor))
    change(array)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


def projection(graph):
    """The second layer's queries, keys and values, packed."""
    packed = attention(graph)[1].input[0]
    (node,) = (node for node in graph.node if packed in node.output)
    return node


def one_weight(graph):
    """One weight, or the scale of one block of weights, by a hundredth of the largest."""

    def nudge(array):
        array.flat[0] += np.abs(array).max() / 100

    changed(graph, projection(graph).input[2 if projection(graph).op_type == "MatMulNBits" else 1], nudge)


def two_heads(graph):
    """The queries of two heads in each other's place; both attend to the same keys."""
    node = projection(graph)
    for index in range(1, len(node.input) if node.op_type == "MatMulNBits" else 2):

        def swap(array, is_rows=node.op_type == "MatMulNBits"):
            rows = array if is_rows else array.T
            rows[: 2 * HEAD] = np.concatenate([rows[HEAD : 2 * HEAD], rows[:HEAD]])

        if node.input[index]:
            changed(graph, node.input[index], swap)


def one_position(graph):
    """The rotation of position 5 is that of position 6."""

    def shift(array):
        array[5] = array[6]

    changed(graph, attention(graph)[0].input[7], shift)


def one_mask(graph):
    """One layer of three attends to the last 30 positions alone."""
    node = attention(graph)[1]
    node.attribute.append(onnx.helper.make_attribute("local_window_size", 30))


def engine(bundle, folder, spoil):
    model = onnx.load(bundle.graph_path)
    spoil(model.graph)
    as_exact(model)
    onnx.save(model, folder / "model.onnx")
    return Engine(bundle, OnnxRuntime(bundle, Session(folder / "model.onnx", is_exact=True)), 320)


def test_the_graph_itself_is_accepted(expected, tmp_path):
    bundle, expectation = expected
    assert compare(expectation, engine(bundle, tmp_path, lambda graph: None), "p3").agrees


@pytest.mark.parametrize("spoil", [one_weight, two_heads, one_position, one_mask])
def test_a_graph_that_is_wrong_in_one_place_is_refused(expected, tmp_path, spoil):
    bundle, expectation = expected
    with pytest.raises(ParityError, match=r"task 'p3': expected the exported graph to agree with peft"):
        compare(expectation, engine(bundle, tmp_path, spoil), "p3")
