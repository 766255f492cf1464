"""A bundle's graph as a network of TensorRT's: parsed, compared with the manifest, with its profiles."""

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
    """The network of a bundle's graph, and the parser, which holds its weights and must live as long.

    Raises:
        EngineError: an operator or a type that TensorRT does not take, or a graph that is none.
    """
    if any(name.endswith(ADAPTER_SUFFIX) for name in bundle.manifest.files):
        raise EngineError(
            f"{bundle.root}: expected a bundle without adapter files, whose graph takes prefixes as inputs that may be "
            "left out, found some; build it with --target tensorrt"
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
    """Give a configuration its profiles; returns them as TensorRT keeps them.

    Raises:
        EngineError: a range that TensorRT does not take.
    """
    return tuple(_add_profile(profile, builder, config) for profile in profiles)


def _add_profile(profile: Profile, builder: Any, config: Any) -> Profile:
    made = builder.create_optimization_profile()
    kept: dict[str, Any] = {}
    for name, shapes in profile.inputs.items():
        is_value = name == NUM_LOGITS_TO_KEEP
        try:
            (made.set_shape_input if is_value else made.set_shape)(name, *shapes)
        except ValueError as error:
            raise EngineError(f"profile {profile.name}: {name}: expected a range, found {shapes}: {error}") from error
        read_shapes = made.get_shape_input(name) if is_value else made.get_shape(name)
        kept[name] = tuple(tuple(shape) for shape in read_shapes)
    if config.add_optimization_profile(made) < 0:
        raise EngineError(f"profile {profile.name}: expected ranges of all inputs that TensorRT takes, found others")
    return Profile(profile.name, kept)


def _graph(bundle: Bundle) -> bytes:
    """The graph, without its weights, whose `num_logits_to_keep` must be given.

    What may be left out is a constant to TensorRT.
    """
    try:
        model = onnx.load(bundle.graph_path, load_external_data=False)
    except Exception as error:  # protobuf's errors share no base with others
        raise EngineError(f"{bundle.graph_path}: expected an ONNX graph, found a file that is none") from error
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
