"""An exported program in operators that torch.onnx translates as they are.

torch.onnx decomposes a program by tracing it a second time, which takes longer than everything else of an export. Of
the operators that decoders are made of, it decomposes a handful. These are replaced here, node by node.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

_aten = torch.ops.aten


class LoweredProgram(ExportedProgram):
    """A program that needs no decomposition."""

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        """The program as it is."""
        return self


def lowered(program: ExportedProgram) -> LoweredProgram | None:
    """The same program, other nodes in the place of those that torch.onnx has no translation for.

    Returns None for a program that has to be traced again: it changes a tensor in place, or holds another program.
    """
    graph = copy.deepcopy(program.graph)  # of nodes; they share the weights
    if any(_needs_trace(node) for node in graph.nodes):
        return None
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _REPLACEMENTS:
            _REPLACEMENTS[node.target](node)
    return LoweredProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _needs_trace(node: Node) -> bool:
    if node.op != "call_function":
        return node.op == "get_attr"  # weights are inputs of a program: what it gets is a program
    if node.target in _REPLACEMENTS:
        return False
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _cast(node: Node) -> None:
    """`to` becomes a cast, or nothing if the tensor is of that type already."""
    (source,) = (argument for argument in node.args[:1] if isinstance(argument, Node))
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype and not any(user.op == "output" for user in node.users):
        _drop(node)
        return
    node.target, node.args, node.kwargs = _aten._to_copy.default, (source,), {"dtype": dtype}  # noqa: SLF001


def _drop(node: Node) -> None:
    """Read what a node takes in place of what it gives."""
    (source,) = (argument for argument in node.args[:1] if isinstance(argument, Node))
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _renamed(operator: Any) -> Callable[[Node], None]:
    """An operator by another name, which torch.onnx knows."""

    def rename(node: Node) -> None:
        node.target = operator

    return rename


def _subtract_from(node: Node) -> None:
    """`rsub`: the second less the first."""
    subtrahend, minuend = node.args
    assert isinstance(subtrahend, Node)
    with node.graph.inserting_before(node):
        negative = node.graph.call_function(_aten.neg.default, (subtrahend,))
    negative.meta = dict(subtrahend.meta)
    node.target, node.args = _aten.add.Tensor, (negative, minuend)


_REPLACEMENTS: Mapping[Any, Callable[[Node], None]] = MappingProxyType(
    {
        _aten.to.dtype: _cast,
        _aten.to.dtype_layout: _cast,
        _aten.to.device: _cast,
        _aten.to.other: _cast,
        _aten.type_as.default: _cast,
        _aten.item.default: _renamed(_aten._local_scalar_dense.default),  # noqa: SLF001  # what it decomposes to
        _aten.__and__.Tensor: _renamed(_aten.bitwise_and.Tensor),
        # What becomes of a constant in the model's code: a copy of it, then the copy itself.
        _aten.lift_fresh_copy.default: _drop,
        _aten.detach_.default: _drop,
        _aten.rsub.Scalar: _subtract_from,
    }
)
