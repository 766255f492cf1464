"""A frozen decoder-only model to an ONNX graph that keeps the contract of `prefix_runtime.bundle.graph_contract`."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch.fx.experimental._config

from prefix_export.errors import ExportError
from prefix_export.progress import SILENT, Progress
from prefix_export.trace.attention import counting_layers
from prefix_export.trace.cuda_decoder import CudaDecoder
from prefix_export.trace.decoder import Decoder, PortableDecoder
from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.files import check_room
from prefix_runtime.os_errors import write_error

from .contract import check_attention, check_axes, check_operators
from .lowering import lowered
from .passes.cleaning import clean
from .passes.fuse import fuse
from .passes.join_rounded import join_rounded
from .passes.simplify import simplify

_MOST_IN_ONE_FILE = 2_000_000_000
"""Bytes of weights; protobuf's own limit is 2 GiB."""

# Inputs, by operator and place, of which a decode step reads a row: embeddings and rotary positions.
_LOOKUPS = {
    ("Gather", 0),
    *(("GatherBlockQuantized", index) for index in (0, 2, 3)),
    *(("GroupQueryAttention", index) for index in (7, 8)),
}


def export_graph(
    decoder: Decoder,
    positions: int,
    path: Path,
    *,
    opset: int,
    has_weights_apart: bool = True,
    progress: Progress = SILENT,
) -> int:
    """Write a graph and its weights, each stored once.

    Args:
        decoder: of a model in evaluation mode.
        positions: that the model has.
        path: of the graph, in a folder that exists.
        opset: of ONNX' own operators.
        has_weights_apart: whether the weights go into a file beside the graph, `NAME.data`.
        progress: told of the layers that are traced, and of what follows.

    Returns:
        The bytes of weights that a decode step reads: all but prefixes and what of tables it does not look up.

    Raises:
        ExportError: torch cannot trace the model, or the trace breaks the contract.
        OSError: the disk is full or not writable.
    """
    progress.phase("export", len(decoder.layers), unit="layers")
    with decoder.stand_ins(), counting_layers(progress.advance):
        graph = _trace(decoder.eval(), opset)
    progress.phase("simplify the graph")
    _name_axes(graph)
    with _quiet():
        clean(graph)
        simplify(graph, positions)
        join_rounded(graph)
        if isinstance(decoder, CudaDecoder):
            fuse(graph)
    _drop_traces_of_the_machine(graph)
    if isinstance(decoder, PortableDecoder):
        check_operators(graph)
        _make_optional(graph, {contract.NUM_LOGITS_TO_KEEP: np.array(0, np.int64)})
        if decoder.takes_prefix:
            nothing = [tensor.numpy() for pair in decoder.zeros(1, 0) for tensor in pair]
            names = [*decoder.pairs(contract.PREFIX), *decoder.pairs(contract.PAST)]
            _make_optional(graph, dict(zip(names, [*nothing, *nothing], strict=True)))
            _make_optional(graph, {contract.POSITION_BASE: np.zeros(1, np.int64)})
    else:
        check_attention(graph, len(decoder.layers))
    check_axes(graph)
    if isinstance(decoder, PortableDecoder) and contract.TASK_ID in decoder.names:
        task_id = next(value for value in graph.graph.inputs if value.name == contract.TASK_ID)
        task_id.doc_string = ", ".join(f"{place}: {task}" for place, task in enumerate(decoder.tasks))
    read_bytes = weight_bytes(graph.graph) - decoder.held_bytes
    stored = sum(tensor.nbytes for tensor in _weights(graph.graph))
    if not has_weights_apart and stored > _MOST_IN_ONE_FILE:
        raise ExportError(
            f"graph: expected at most {_MOST_IN_ONE_FILE / 1e9:.1f} GB of weights and prefixes for one file, "
            f"found {stored / 1e9:.1f}; take a lower precision or fewer prefixes"
        )
    progress.phase("save the graph", round(stored / 1e6), unit="MB")
    check_room(path, stored)
    try:
        ir.save(
            graph,
            path,
            external_data=f"{path.name}.data" if has_weights_apart else None,
            callback=lambda tensor, _: progress.advance(tensor.nbytes / 1e6),
        )
    except OSError as error:
        raise write_error(path, error) from error
    progress.phase("check the graph")
    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"graph: expected a model that onnx's checker accepts, found {error}") from error
    return read_bytes


def _trace(decoder: Decoder, opset: int) -> ir.Model:
    try:
        with torch.no_grad(), _quiet():
            return _translate(decoder, opset)
    except torch.onnx.errors.OnnxExporterError as error:
        cause = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"{type(decoder.model).__name__}: torch.onnx cannot trace the model: {cause}") from error


def _translate(decoder: Decoder, opset: int) -> ir.Model:
    """The graph as torch's exporter makes it, with much in it that `clean` takes out."""
    shapes = decoder.dynamic_shapes()
    settings: dict[str, Any] = {
        "dynamic_shapes": shapes,
        "input_names": decoder.names,
        "output_names": decoder.outputs,
        "opset_version": opset,
        "dynamo": True,
        "optimize": False,
        "verbose": False,
    }
    # If this fails, torch can tell why, or traces the model in another way.
    with suppress(Exception):
        program = lowered(_captured(decoder, shapes))
        if program is not None:
            return _model(torch.onnx.export(program, **settings))
    return _model(torch.onnx.export(decoder, kwargs=decoder.example(), **settings))


def _model(program: torch.onnx.ONNXProgram | None) -> ir.Model:
    assert program is not None  # torch.onnx.export returns None only with dynamo=False
    return program.model


def _captured(decoder: Decoder, shapes: dict[str, Any]) -> torch.export.ExportedProgram:
    """The program of a model, captured as torch.onnx captures it (torch 2.13)."""
    # Sizes of 0 and 1 are sizes like any other.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # noqa: SLF001  # torch has no public switch
        return torch.export.export(
            decoder,
            (),
            kwargs=decoder.example(),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _name_axes(graph: ir.Model) -> None:
    """Give the number of kept logits a name of its own, wherever it occurs; torch names it by an expression."""
    logits = graph.graph.outputs[0]
    expression = logits.shape[1] if logits.shape is not None else None
    for value in _values(graph.graph):
        if value.shape is not None:
            for axis, size in enumerate(value.shape):
                if size == expression:
                    value.shape[axis] = ir.SymbolicDim(contract.LOGITS_LENGTH)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def weight_bytes(graph: ir.Graph) -> int:
    """The bytes of a graph's weights, but for tables that a run looks a row of up."""

    def is_read(value: ir.Value) -> bool:
        return any((use.node.op_type, use.idx) not in _LOOKUPS for use in value.uses())

    return sum(tensor.nbytes for tensor in _weights(graph, is_read))


def _weights(graph: ir.Graph, is_wanted: Callable[[ir.Value], bool] = lambda _: True) -> list[ir.TensorProtocol]:
    tensors = [value.const_value for value in graph.initializers.values() if is_wanted(value)]
    return [tensor for tensor in tensors if tensor is not None]


def _drop_traces_of_the_machine(graph: ir.Model) -> None:
    """Remove what torch notes about the Python code that was traced: paths of the machine, and megabytes of them."""
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in graph.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()


def _make_optional(graph: ir.Model, defaults: Mapping[str, np.ndarray]) -> None:
    """Let clients that do not know some inputs leave them out."""
    inputs = {value.name: value for value in graph.graph.inputs}
    for name, default in defaults.items():
        inputs[name].const_value = ir.tensor(default, name=name)
        graph.graph.register_initializer(inputs[name])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on its own workings, which a user can do nothing about, from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
