"""A frozen decoder-only model to an ONNX graph with the contract that the runtime, and other clients, run.

| input | shape | |
|---|---|---|
| `input_ids` | `[batch_size, sequence_length]` int64 | |
| `attention_mask` | `[batch_size, total_sequence_length]` int64 | past and new tokens |
| `position_ids` | `[batch_size, sequence_length]` int64 | explicit, so that a prefix may or may not move positions |
| `past_key_values.{i}.key`, `.value` | `[batch_size, num_key_value_heads, past_sequence_length, head_dim]` | |
| `num_logits_to_keep` | scalar int64 | 0 keeps all, n the last n |

Outputs: `logits` `[batch_size, logits_length, vocab]`; `present.{i}.key`, `.value`, shaped like the past, whose buffers
they share: the operator appends in place.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefix_runtime import LayerPrefix

from .attention import AttentionLayer, GroupQueryAttention, attention
from .errors import ExportError
from .simplify import simplify

OPSET = 20
GRAPH_NAME = "model.onnx"
_LOGITS_LENGTH = "logits_length"
# Inputs, by operator and place, of which a decode step reads a row: embeddings and rotary positions.
_LOOKUPS = {
    ("Gather", 0),
    *(("GatherBlockQuantized", index) for index in (0, 2, 3)),
    *(("GroupQueryAttention", index) for index in (7, 8)),
}


def export_graph(
    model: PreTrainedModel,
    layers: tuple[AttentionLayer, ...],
    positions: int,
    folder: Path,
    *,
    cache: torch.dtype = torch.float32,
    scales: Sequence[LayerPrefix] | None = None,
) -> int:
    """Write `model.onnx` and `model.onnx.data`, the weights, each stored once, into a folder.

    Args:
        model: in float32, in evaluation mode.
        layers: its attention layers, as `attention.probe` found them.
        positions: that the model has.
        folder: that exists.
        cache: of past and present keys and values, float32, float16 or int8.
        scales: for int8 each layer's, [num_key_value_heads, 1, head_dim] float32.

    Returns:
        The bytes of weights that a decode step reads: all but the rows of tables that it does not look up.

    Raises:
        ExportError: torch cannot trace the model, or the trace breaks the contract.
        OSError: the disk is full or not writable.
    """
    with _plain_projections(model):
        program = _trace(_Decoder(model, len(layers), scales).eval(), layers, cache)
    graph = program.model
    _name_axes(graph)
    with _quiet():
        simplify(graph, positions)
    _drop_traces_of_the_machine(graph)
    _check_contract(graph, len(layers))
    try:
        ir.save(graph, folder / GRAPH_NAME, external_data=f"{GRAPH_NAME}.data")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder / GRAPH_NAME)) from error
    try:
        onnx.checker.check_model(folder / GRAPH_NAME)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"graph: expected a model that onnx's checker accepts, found {error}") from error
    return _weight_bytes(graph.graph)


class _Decoder(torch.nn.Module):
    """A model whose attention reads and extends a past that is given from outside."""

    def __init__(self, model: PreTrainedModel, layers: int, scales: Sequence[LayerPrefix] | None) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.has_scales = scales is not None
        for index, layer in enumerate(scales or ()):
            self.register_buffer(f"key_scale_{index}", torch.tensor(layer.key)[None])
            self.register_buffer(f"value_scale_{index}", torch.tensor(layer.value)[None])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
        num_logits_to_keep: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        lengths = (attention_mask.sum(1) - 1).to(torch.int32)
        total = _size(attention_mask, 1).to(torch.int32)
        function = GroupQueryAttention(past, lengths, total, self._scales())
        with attention(self.model, function):
            output = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=_kept(num_logits_to_keep, input_ids.shape[1]),
            )
        return (output.logits, *(tensor for i in range(self.layers) for tensor in function.present[i]))

    def _scales(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        if not self.has_scales:
            return None
        named = dict(self.named_buffers(recurse=False))
        return [(named[f"key_scale_{index}"], named[f"value_scale_{index}"]) for index in range(self.layers)]


class _Projection(torch.nn.Module):
    """What transformers' `Conv1D` computes, without the reshapes that it puts around."""

    def __init__(self, original: Conv1D) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        return activation @ self.weight + self.bias


@contextmanager
def _plain_projections(model: PreTrainedModel) -> Iterator[None]:
    """Trace `Conv1D` (GPT-2's linear layer) as a `MatMul` and an `Add`."""
    before = {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}
    try:
        for name, module in before.items():
            model.set_submodule(name, _Projection(module))
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _size(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """An axis' size, a scalar int64 of the graph: `tensor.shape[axis]` would be a number of the trace."""
    shape = torch.onnx.ops.symbolic(
        "Shape", (tensor,), attrs={"start": axis, "end": axis + 1}, dtype=torch.int64, shape=(1,), version=15
    )
    return shape.reshape(())


def _kept(count: torch.Tensor, sequence: int) -> torch.Tensor:
    """The positions whose logits are wanted: the last `count` of `sequence`, or all for 0."""
    first = torch.where(count == 0, 0, sequence - count).item()
    # The trace knows nothing of this number: what it may be has to be said.
    torch._check(first >= 0)  # noqa: SLF001  # torch documents it for torch.export
    torch._check(first <= sequence)  # noqa: SLF001
    return torch.arange(first, sequence)


def _trace(decoder: _Decoder, layers: tuple[AttentionLayer, ...], cache: torch.dtype) -> torch.onnx.ONNXProgram:
    names = [f"{{}}.{index}.{part}" for index in range(len(layers)) for part in ("key", "value")]
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                decoder,
                kwargs=_example(layers, cache),
                dynamic_shapes=_dynamic_shapes(len(layers)),
                input_names=[
                    "input_ids",
                    "attention_mask",
                    "position_ids",
                    *(name.format("past_key_values") for name in names),
                    "num_logits_to_keep",
                ],
                output_names=["logits", *(name.format("present") for name in names)],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"{type(decoder.model).__name__}: torch.onnx cannot trace the model: {cause}") from error
    assert program is not None  # torch.onnx.export returns None only with dynamo=False
    return program


def _example(layers: tuple[AttentionLayer, ...], cache: torch.dtype) -> dict[str, Any]:
    # Sizes that occur once each, so that the trace takes no two axes for one.
    batch, sequence, past, buffer = 2, 3, 5, 11

    def cached(layer: AttentionLayer) -> torch.Tensor:
        return torch.zeros(batch, layer.key_value_heads, buffer, layer.head_dim, dtype=cache)

    return {
        "input_ids": torch.zeros(batch, sequence, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + sequence, dtype=torch.int64),
        "position_ids": torch.arange(past, past + sequence).repeat(batch, 1),
        "past": [(cached(layer), cached(layer)) for layer in layers],
        "num_logits_to_keep": torch.tensor(1),
    }


def _dynamic_shapes(layers: int) -> dict[str, Any]:
    axis = torch.export.Dim
    batch, sequence = axis("batch_size"), axis("sequence_length")
    past = {0: batch, 2: axis("past_sequence_length")}
    return {
        "input_ids": {0: batch, 1: sequence},
        "attention_mask": {0: batch, 1: axis("total_sequence_length")},
        "position_ids": {0: batch, 1: sequence},
        "past": [(past, past)] * layers,
        "num_logits_to_keep": {},
    }


def _name_axes(graph: ir.Model) -> None:
    """Give the number of kept logits a name of its own, wherever it occurs; torch names it by an expression."""
    logits = graph.graph.outputs[0]
    expression = logits.shape[1] if logits.shape is not None else None
    for value in _values(graph.graph):
        if value.shape is not None:
            for axis, size in enumerate(value.shape):
                if size == expression:
                    value.shape[axis] = ir.SymbolicDim(_LOGITS_LENGTH)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _weight_bytes(graph: ir.Graph) -> int:
    def is_table(value: ir.Value) -> bool:
        return all((use.node.op_type, use.idx) in _LOOKUPS for use in value.uses())

    tensors = [value.const_value for value in graph.initializers.values() if not is_table(value)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


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


def _check_contract(graph: ir.Model, layers: int) -> None:
    operators = sum(node.op_type == "GroupQueryAttention" for node in graph.graph)
    if operators != layers:
        raise ExportError(f"graph: expected {layers} GroupQueryAttention nodes, found {operators}")
    for name, shape in {
        "input_ids": "batch_size, sequence_length",
        "attention_mask": "batch_size, total_sequence_length",
        "position_ids": "batch_size, sequence_length",
    }.items():
        value = next((value for value in graph.graph.inputs if value.name == name), None)
        found = (
            ", ".join(str(size) for size in value.shape) if value is not None and value.shape is not None else "none"
        )
        if found != shape:
            raise ExportError(f"graph: input {name}: expected axes [{shape}], found [{found}]")


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
