"""Parse a bundle's graph into a TensorRT network, and add its profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx

from prefix_export.errors import EngineError
from prefix_runtime import Bundle
from prefix_runtime.backends.tensorrt.library import Library, dtype_name
from prefix_runtime.backends.tensorrt.profile import Profile, Tensor
from prefix_runtime.bundle.folder import ADAPTER_SUFFIX
from prefix_runtime.bundle.graph_contract import NUM_LOGITS_TO_KEEP


def parse(bundle: Bundle, builder: Any, library: Library, *, is_strongly_typed: bool) -> tuple[Any, Any]:
    """The network of a bundle's graph, and the parser. The parser holds the weights and must live as long.

    Raises:
        EngineError: the graph has an operator or type that TensorRT does not support, takes prefixes as optional
            inputs, or is not an ONNX graph.
    """
    if any(name.endswith(ADAPTER_SUFFIX) for name in bundle.manifest.files):
        raise EngineError(
            f"{bundle.root}: expected a bundle without adapter files, because their graph has optional inputs, found "
            "some; build it with --target tensorrt"
        )
    api = library.api
    flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if is_strongly_typed else 0
    network = builder.create_network(flags)
    parser = api.OnnxParser(network, library.logger)
    path = bundle.graph_path
    if not parser.parse(_graph(bundle), str(path)):
        raise EngineError(f"{path}: {library.name} does not take the graph: {_reason(parser, library)}")
    return network, parser


def tensors(network: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs and outputs of a network."""

    def read(tensor: Any) -> Tensor:
        return Tensor(tensor.name, dtype_name(tensor.dtype), tuple(tensor.shape))

    inputs = tuple(read(network.get_input(index)) for index in range(network.num_inputs))
    return inputs, tuple(read(network.get_output(index)) for index in range(network.num_outputs))


def add_profiles(profiles: Sequence[Profile], builder: Any, config: Any) -> tuple[Profile, ...]:
    """Add profiles to a configuration; returns them as read back from TensorRT.

    Raises:
        EngineError: TensorRT refuses a range; the message names the profile and the input.
    """
    return tuple(_add_profile(profile, builder, config) for profile in profiles)


def _add_profile(profile: Profile, builder: Any, config: Any) -> Profile:
    added = builder.create_optimization_profile()
    read_ranges: dict[str, Any] = {}
    for name, shapes in profile.inputs.items():
        is_value = name == NUM_LOGITS_TO_KEEP
        try:
            (added.set_shape_input if is_value else added.set_shape)(name, *shapes)
        except ValueError as error:
            raise EngineError(f"profile {profile.name}: {name}: expected a range, found {shapes}: {error}") from error
        read_shapes = added.get_shape_input(name) if is_value else added.get_shape(name)
        read_ranges[name] = tuple(tuple(shape) for shape in read_shapes)
    if config.add_optimization_profile(added) < 0:
        raise EngineError(f"profile {profile.name}: expected ranges of all inputs that TensorRT takes, found others")
    return Profile(profile.name, read_ranges)


def _graph(bundle: Bundle) -> bytes:
    """The graph without weights. `num_logits_to_keep` loses its default, which TensorRT would make a constant."""
    try:
        model = onnx.load(bundle.graph_path, load_external_data=False)
    except Exception as error:  # protobuf's errors share no base with others
        raise EngineError(f"{bundle.graph_path}: expected an ONNX graph, found another file") from error
    defaults = [tensor for tensor in model.graph.initializer if tensor.name == NUM_LOGITS_TO_KEEP]
    for tensor in defaults:
        model.graph.initializer.remove(tensor)
    content: bytes = model.SerializeToString()
    return content


def _reason(parser: Any, library: Library) -> str:
    if parser.num_errors == 0:
        return library.complaint() or "no reason given"
    error = parser.get_error(0)
    node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
    return f"{node}{' '.join(str(error.desc()).split())}"
