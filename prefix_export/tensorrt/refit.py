"""Replace a prefix in an engine, without building the engine again."""

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
    """The weight of a graph that holds an array of its prefixes, [tasks, heads, positions, head_dim] or transposed."""

    key: str
    weight: str
    is_transposed: bool


def prefix_weights(bundle: Bundle) -> dict[str, str]:
    """For each array of the bundle's prefixes, such as `0.key`, the name of the weight in the graph that holds it.

    Raises:
        EngineError: the graph does not hold one of the arrays in that form; build the engine again for another prefix.
    """
    return {place.key: place.weight for place in _places(bundle)}


def mark_prefixes(network: Any, weights: Mapping[str, str]) -> None:
    """Mark the weights of prefixes as refittable, so that the builder does not fold them.

    Raises:
        EngineError: the network has no such weight; the message names it.
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
    """Write a copy of an engine with another prefix for one task. It needs a GPU that runs the engine.

    Args:
        bundle: the bundle from which the engine was built.
        engine: the engine's file.
        record: the engine's record.
        task: the task whose prefix is replaced.
        prefix: the new prefix, of the same length and position base.
        output: a folder for the copy and its record; it must not exist.
        library: TensorRT.

    Raises:
        EngineError: the engine was not built with `--refit`, or this machine has no GPU that runs it.
        UnknownTaskError: the bundle has no such task; the message lists its tasks.
        PrefixMismatchError: the prefix has another length or position base; build the bundle and the engine with it.
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
    """The serialized engine with new weights, which can be replaced again."""
    api = library.api
    refitter = api.Refitter(engine, library.logger)
    for name, array in weights.items():
        if not refitter.set_named_weights(name, api.Weights(array)):
            raise EngineError(
                f"refit: weight {name}: expected one that the engine takes, found none {library.complaint()}"
            )
    if missing := refitter.get_missing_weights():
        raise EngineError(
            f"refit: expected only prefixes to change, found other weights that must: {', '.join(missing)}"
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
    expected, actual = (entry.prefix_length, entry.position_base), (prefix.prefix_length, prefix.position_base)
    if expected != actual:
        raise PrefixMismatchError(
            f"task {task!r}: expected a prefix of length {expected[0]} and position base {expected[1]}, which the "
            f"engine has room for, found {actual[0]} and {actual[1]}; build the bundle and the engine with it"
        )


def _weights(bundle: Bundle, task: str, prefix: Prefix) -> dict[str, np.ndarray]:
    """The weights of a graph with another prefix for a task, by name."""
    prefixes = {name: bundle.prefix(name) for name in bundle.tasks} | {task: prefix}
    arrays = dict(_arrays(prefixes, bundle))
    return {
        place.weight: np.ascontiguousarray(_turned(arrays[place.key]) if place.is_transposed else arrays[place.key])
        for place in _places(bundle)
    }


def _places(bundle: Bundle) -> list[_Place]:
    """The weight for each array of the prefixes, found by value: torch's export does not keep the names of all."""
    model = onnx.load(bundle.graph_path, load_external_data=False)
    prefixes = {task: bundle.prefix(task) for task in bundle.tasks}
    left = list(model.graph.initializer)
    places = []
    for key, array in _arrays(prefixes, bundle):
        for tensor in left:
            weight = _weight(tensor, array.size, bundle.graph_path.parent)
            is_same, is_turned = (
                weight is not None and np.array_equal(weight, each) for each in (array, _turned(array))
            )
            if is_same or is_turned:
                left.remove(tensor)
                places.append(_Place(key, tensor.name, is_transposed=not is_same))
                break
        else:
            raise EngineError(
                f"refit: {key}: expected a weight of the graph that equals the prefix, found none; build the bundle "
                "and the engine again for another prefix"
            )
    return places


def _arrays(prefixes: Mapping[str, Prefix], bundle: Bundle) -> Iterator[tuple[str, np.ndarray]]:
    dtype = CACHE_TYPES[bundle.manifest.cache]
    for index, pair in enumerate(PrefixBank.of(prefixes).layers):
        for part, array in zip(("key", "value"), pair, strict=True):
            yield f"{index}.{part}", array.astype(dtype)


def _turned(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2)


def _weight(tensor: onnx.TensorProto, size: int, folder: Path) -> np.ndarray | None:
    """The array of a tensor with four axes and this size; None for other tensors."""
    if len(tensor.dims) != 4 or int(np.prod(tensor.dims)) != size:
        return None
    if uses_external_data(tensor):
        load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = onnx.TensorProto.DEFAULT
    return numpy_helper.to_array(tensor)
