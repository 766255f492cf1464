"""A graph that somebody else exported, taken into a bundle as it is where it keeps the graph contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from prefix_export.errors import ExportError
from prefix_export.trace.attention import AttentionLayer
from prefix_runtime import ProviderError
from prefix_runtime.backends.onnxruntime.session import Session
from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.os_errors import write_error

from .export import weight_bytes

_ROUNDED = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "MatMulNBits", "GatherBlockQuantized"})
_KNOWN = (*contract.TOKEN_INPUTS, contract.NUM_LOGITS_TO_KEEP)


def adopt_graph(source: Path, layers: Sequence[AttentionLayer], vocab_size: int, path: Path) -> int:
    """Check a decoder-with-past and write it, with the weights beside it, as `path` and `path.data`.

    Args:
        source: a graph with the portable flavour's inputs and outputs, in float32, as optimum exports them.
        layers: of the model that it is of.
        vocab_size: the model's.
        path: of the bundle's graph.

    Returns:
        The bytes of weights that a decode step reads.

    Raises:
        ExportError: the file is no graph, or breaks the contract; naming what does not fit.
        OSError: the disk is full or not writable.
    """
    _check_contract(source, layers, vocab_size)
    try:
        Session(source)
    except ProviderError as error:
        raise ExportError(f"graph {source}: expected one that onnxruntime runs, found {error}") from error
    model = onnx.load(source)
    weights = f"{path.name}.data"
    try:
        onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=weights)
    except OSError as error:
        raise write_error(path, error) from error
    return weight_bytes(ir.load(path).graph)


def _check_contract(source: Path, layers: Sequence[AttentionLayer], vocab_size: int) -> None:
    try:
        onnx.checker.check_model(source)  # by its path: a model in memory may not be larger than 2 GiB
        model = onnx.load(source, load_external_data=False)
    except Exception as error:  # protobuf's errors and onnx' own share no base
        reason = " ".join((str(error).strip() or type(error).__name__).split())
        raise ExportError(
            f"graph {source}: expected an ONNX model, whole with its weights, none of them links, found {reason}"
        ) from error
    _check_weights(model.graph, source)
    if rounded := next((node for node in model.graph.node if node.op_type in _ROUNDED), None):
        raise ExportError(
            f"graph {source}: node {rounded.name!r}: expected weights in float32, found {rounded.op_type}; export the "
            "graph before its weights are rounded"
        )
    _check_inputs(model.graph, layers, source)
    _check_outputs(model.graph, layers, vocab_size, source)


def _check_weights(graph: onnx.GraphProto, source: Path) -> None:
    """Refuse a file of weights that ends before they do, which onnxruntime says in its own words alone."""
    for tensor in filter(uses_external_data, graph.initializer):
        try:
            place = ExternalDataInfo(tensor)
        except ValueError as error:
            raise ExportError(
                f"graph {source}: weight {tensor.name}: expected its place in a file, found {error}"
            ) from error
        path = source.parent / place.location
        needed, available = (place.offset or 0) + (place.length or 0), path.stat().st_size
        if needed > available:
            raise ExportError(
                f"graph {source}: weight {tensor.name}: expected {path.name} of {needed} bytes or more, found "
                f"{available}; copy it again, it is not whole"
            )


def _check_inputs(graph: onnx.GraphProto, layers: Sequence[AttentionLayer], source: Path) -> None:
    optional = {tensor.name for tensor in graph.initializer}
    given = {value.name: value for value in graph.input}
    past = _shapes(contract.PAST, layers)
    for name in (contract.INPUT_IDS, contract.ATTENTION_MASK, *past):
        if name not in given:
            others = ", ".join(sorted(given.keys() - optional)[:6])
            raise ExportError(f"graph {source}: expected an input {name}, found {others}, …")
    for name, value in given.items():
        if name in past:
            _check_value(value, past[name], onnx.TensorProto.FLOAT, source)
        elif name in _KNOWN:
            shape = (None,) * len(contract.TOKEN_INPUTS.get(name, ()))
            _check_value(value, shape, onnx.TensorProto.INT64, source)
        elif name not in optional:
            raise ExportError(
                f"graph {source}: input {name}: expected {', '.join(_KNOWN)} and past_key_values.{{i}}.key and .value "
                "for each layer, found an input that the runtime does not know"
            )


def _check_outputs(graph: onnx.GraphProto, layers: Sequence[AttentionLayer], vocab_size: int, source: Path) -> None:
    made = {value.name: value for value in graph.output}
    wanted = {contract.LOGITS: (None, None, vocab_size), **_shapes(contract.PRESENT, layers)}
    for name, shape in wanted.items():
        if name not in made:
            raise ExportError(f"graph {source}: expected an output {name}, found {', '.join(made)}")
        _check_value(made[name], shape, onnx.TensorProto.FLOAT, source)


def _shapes(name: str, layers: Sequence[AttentionLayer]) -> dict[str, tuple[int | None, ...]]:
    return {
        contract.tensor_name(name, index, part): (None, layer.key_value_heads, None, layer.head_dim)
        for index, layer in enumerate(layers)
        for part in contract.PARTS
    }


def _check_value(value: onnx.ValueInfoProto, shape: tuple[int | None, ...], kind: int, source: Path) -> None:
    _check_type(value, kind, source)
    actual = [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
    pairs = zip(actual, shape, strict=False)
    # A size that the model has may be left open; an axis that varies may not be fixed.
    fits = len(actual) == len(shape) and all(left is None or left == right for left, right in pairs)
    if not fits:
        expected, shown = (", ".join("?" if size is None else str(size) for size in each) for each in (shape, actual))
        raise ExportError(f"graph {source}: {value.name}: expected shape [{expected}], found [{shown}]")


def _check_type(value: onnx.ValueInfoProto, kind: int, source: Path) -> None:
    if not value.type.tensor_type.HasField("shape"):
        raise ExportError(f"graph {source}: {value.name}: expected a tensor with a shape, found none")
    dtype = value.type.tensor_type.elem_type
    if dtype != kind:
        names = (onnx.TensorProto.DataType.Name(each).lower() for each in (kind, dtype))
        raise ExportError(f"graph {source}: {value.name}: expected {next(names)}, found {next(names)}")
