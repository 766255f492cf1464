"""Which files of weights a graph names, compared with what the onnx package finds in the same graph."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import _get_all_tensors, set_external_data, uses_external_data

from prefix_runtime.bundle.external_files import external_files


def named(model):
    """As the onnx package has it."""
    return {
        entry.value
        for tensor in _get_all_tensors(model)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }


def outside(location):
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), location)
    set_external_data(tensor, location, 0, 16)
    tensor.ClearField("raw_data")
    return tensor


def constant(location):
    return helper.make_node("Constant", [], [f"of {location}"], value=outside(location))


def graph(nodes, *initializers):
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_graph(nodes, "graph", [], [output], list(initializers))


def test_a_bundles_graph_names_its_weights(shared_bundle):
    content = (shared_bundle / "model.onnx").read_bytes()
    assert external_files(content) == named(onnx.load_from_string(content)) == {"model.onnx.data"}


def test_names_are_found_wherever_a_tensor_may_stand():
    inner = helper.make_node(
        "If", ["c"], ["z"], then_branch=graph([constant("b")], outside("c")), else_branch=graph([])
    )
    listed = helper.make_node("Odd", [], ["y"], values=[outside("e"), outside("f")], graphs=[graph([], outside("g"))])
    sparse = helper.make_node("Constant", [], ["s"], sparse_value=helper.make_sparse_tensor(
        outside("h"), numpy_helper.from_array(np.zeros(4, np.int64)), [4]
    ))  # fmt: skip
    model = helper.make_model(
        graph(
            [constant("d"), inner, listed, sparse], outside("a"), numpy_helper.from_array(np.ones(3, np.float32), "in")
        )
    )
    assert external_files(model.SerializeToString()) == set("abcdefgh")
    assert named(model) <= set("abcdefgh")


def test_names_in_functions_are_found():
    function = helper.make_function("own", "F", [], ["of f"], [constant("f")], [helper.make_opsetid("", 17)])
    model = helper.make_model(graph([]), functions=[function])
    assert external_files(model.SerializeToString()) == {"f"}


def test_weights_inside_are_not_looked_at():
    model = helper.make_model(graph([], numpy_helper.from_array(np.ones(1 << 16, np.float32), "in")))
    assert external_files(model.SerializeToString()) == set()


def test_graphs_that_are_nested_without_end_are_refused():
    def field(number, content):
        length = len(content)
        return bytes([number << 3 | 2, length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + content

    innermost = b""
    for _ in range(40):
        innermost = field(1, field(5, field(6, innermost)))  # a node's attribute's graph
    with pytest.raises(ValueError, match="messages more than 100 deep"):
        external_files(field(7, innermost))


def test_damaged_bytes_are_refused_or_name_something(shared_bundle):
    whole, chance = (shared_bundle / "model.onnx").read_bytes()[:20_000], random.Random(1)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(3):
            content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            external_files(bytes(content))
        except ValueError:
            refused += 1
    assert refused > 100
