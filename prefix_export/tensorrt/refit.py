"""Another prefix in the place of one that an engine holds, without building it anew."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from prefix_export.errors import EngineError
from prefix_export.trace.prefix_bank import PrefixBank
from prefix_runtime import Bundle, Prefix, PrefixMismatchError
from prefix_runtime.backends.tensorrt.library import Library
from prefix_runtime.backends.tensorrt.tensorrt_engine_file import TensorRTEngineRecord, add_tensorrt_engine
from prefix_runtime.bundle.staging import check_output
from prefix_runtime.bundle.task_names import unknown_task
from prefix_runtime.prefix.cache_format import CACHE_TYPES


@dataclass(frozen=True)
class _Place:
    """Where a graph holds an array of its prefixes, [tasks, heads, positions, head_dim], the last two turned or not."""

    key: str
    weight: str
    is_transposed: bool


def prefix_weights(bundle: Bundle) -> dict[str, str]:
    """By each array of the bundle's prefixes (`0.key`) the weight of the graph that holds it.

    Raises:
        EngineError: the graph holds one of them in another form, or not at all.
    """
    return {place.key: place.weight for place in _places(bundle)}


def mark_prefixes(network: Any, weights: Mapping[str, str]) -> None:
    """Let a network's builder keep some weights as they are, so that others may take their places.

    Raises:
        EngineError: the network has no such weight.
    """
    for key, name in weights.items():
        if not network.mark_weights_refittable(name):
            raise EngineError(f"refit: {key}: expected a weight {name!r} of the network, found none")


def refit_tensorrt_engine(
    bundle: Bundle,
    engine: Path,
    record: TensorRTEngineRecord,
    *,
    task: str,
    prefix: Prefix,
    output: Path,
    library: Library,
) -> TensorRTEngineRecord:
    """Write a copy of an engine that holds another prefix in the place of a task's; this needs a GPU that runs it.

    Args:
        bundle: that the engine was built of.
        engine: its file.
        record: of it.
        task: whose prefix is replaced.
        prefix: of the same length and position base.
        output: a folder for the copy and its record, which must not exist yet.
        library: TensorRT.

    Raises:
        EngineError: the engine may not be refitted, or cannot be here.
        UnknownTaskError, PrefixMismatchError: there is no such task, or the prefix does not fit in its place.
        OSError: the disk is full or not writable.
    """
    check_output(output)
    if not record.refittable:
        raise EngineError(f"engine {record.name!r}: expected one that was built with --refit, found one that was not")
    _check(bundle, task, prefix)
    weights = _weights(bundle, task, prefix)
    opened = library.open(engine.read_bytes()) if library.has_gpu else None
    if opened is None:
        raise EngineError(
            f"refit: {library.name}: expected a GPU that runs engine {record.name!r}, found none {library.complaint()}"
        )
    plan = _refitted(opened, weights, library)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in weights.values())).hexdigest()
    options = {**record.options, "refitted": {**record.options.get("refitted", {}), task: digest}}
    output.mkdir()
    return add_tensorrt_engine(output, replace(record, options=options), plan)


def _refitted(engine: Any, weights: Mapping[str, np.ndarray], library: Library) -> bytes:
    """The serialized engine with new weights, which may be replaced again."""
    api = library.api
    refitter = api.Refitter(engine, library.logger)
    for name, array in weights.items():
        if not refitter.set_named_weights(name, api.Weights(array)):
            raise EngineError(
                f"refit: weight {name}: expected one that the engine takes, found none {library.complaint()}"
            )
    if missing := refitter.get_missing_weights():
        raise EngineError(
            f"refit: expected prefixes to be all that changes, found more that must: {', '.join(missing)}"
        )
    if not refitter.refit_cuda_engine():
        raise EngineError(f"refit: {library.name} cannot replace the weights {library.complaint()}")
    config = engine.create_serialization_config()
    config.set_flag(api.SerializationFlag.INCLUDE_REFIT)
    return bytes(engine.serialize_with_config(config))


def _check(bundle: Bundle, task: str, prefix: Prefix) -> None:
    entry = bundle.manifest.tasks.get(task)
    if entry is None:
        raise unknown_task(task, bundle.manifest.tasks)
    bundle.check_prefix(prefix, f"task {task!r}")
    wanted, actual = (entry.prefix_length, entry.position_base), (prefix.prefix_length, prefix.position_base)
    if wanted != actual:
        raise PrefixMismatchError(
            f"task {task!r}: expected a prefix of length {wanted[0]} and position base {wanted[1]}, which the engine "
            f"has room for, found {actual[0]} and {actual[1]}; build the bundle and the engine with it"
        )


def _weights(bundle: Bundle, task: str, prefix: Prefix) -> dict[str, np.ndarray]:
    """The weights of a graph with another prefix for a task, by their names."""
    prefixes = {name: bundle.prefix(name) for name in bundle.tasks} | {task: prefix}
    arrays = dict(_arrays(prefixes, bundle))
    return {
        place.weight: np.ascontiguousarray(_turned(arrays[place.key]) if place.is_transposed else arrays[place.key])
        for place in _places(bundle)
    }


def _places(bundle: Bundle) -> list[_Place]:
    """Where the graph holds each array of its prefixes: torch's export names some by the step that made them."""
    model = onnx.load(bundle.graph_path, load_external_data=False)
    prefixes = {task: bundle.prefix(task) for task in bundle.tasks}
    left = list(model.graph.initializer)
    places = []
    for key, array in _arrays(prefixes, bundle):
        for tensor in left:
            held = _held(tensor, array.size, bundle.graph_path.parent)
            is_same, is_turned = (held is not None and np.array_equal(held, each) for each in (array, _turned(array)))
            if is_same or is_turned:
                left.remove(tensor)
                places.append(_Place(key, tensor.name, is_transposed=not is_same))
                break
        else:
            raise EngineError(
                f"refit: {key}: expected a weight of the graph that holds the prefix as it is, found none; an engine "
                "of this model has to be built anew for another prefix"
            )
    return places


def _arrays(prefixes: Mapping[str, Prefix], bundle: Bundle) -> Iterator[tuple[str, np.ndarray]]:
    dtype = CACHE_TYPES[bundle.manifest.cache]
    for index, pair in enumerate(PrefixBank.of(prefixes).layers):
        for part, array in zip(("key", "value"), pair, strict=True):
            yield f"{index}.{part}", array.astype(dtype)


def _turned(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2)


def _held(tensor: onnx.TensorProto, size: int, folder: Path) -> np.ndarray | None:
    """What a tensor holds, where it has four axes and as many numbers."""
    if len(tensor.dims) != 4 or int(np.prod(tensor.dims)) != size:
        return None
    if uses_external_data(tensor):
        load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = onnx.TensorProto.DEFAULT
    return numpy_helper.to_array(tensor)
