"""A serialized TensorRT engine opened on a GPU, through TensorRT's own API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefix_runtime.backends.gpu import open_device
from prefix_runtime.backends.options import TENSORRT_ENGINE, Cuda
from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.errors import ProviderError

from .library import Library, check_profiles, check_tensors, gpu_capability
from .profile import DECODE, PREFILL, Limits, Profile, Shape, tensors
from .tensorrt_engine_file import (
    TensorRTEngineRecord,
    read_tensorrt_engine,
    read_tensorrt_engines,
    tensorrt_engines_folder,
)

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.device import Device, Memory

_LEAST_OF_RTX = (8, 0)
"""The compute capability that TensorRT for RTX builds for where none is asked for, and above."""
_NOT_OF_RTX = (9, 10, 11)
"""Major compute capabilities: of data centres (Hopper, Blackwell), and Thor, for which it does not build."""


class TensorRTEngineSession:
    """An engine with a context for prompts and one for decode steps; runs are ordered on the device's stream.

    Args:
        library: TensorRT.
        engine: `ICudaEngine`.
        profiles: its own, at `PREFILL` and `DECODE`.
        device: the GPU that it was opened on.

    Attributes:
        device: as given.
        inputs: the names of its inputs.
        limits: how large a run may be.

    Raises:
        ProviderError: TensorRT makes no context, as where memory is short.
    """

    def __init__(self, library: Library, engine: Any, profiles: Sequence[Profile], device: Device) -> None:
        self._library, self._engine, self.device = library, engine, device
        self.limits = limits_of(profiles)
        self.inputs = frozenset(tensor.name for tensor in library.tensors(engine)[0])
        self._contexts = tuple(self._context(place) for place in (PREFILL, DECODE))
        self._is_kept_on_host = (
            engine.get_tensor_location(contract.NUM_LOGITS_TO_KEEP) == library.api.TensorLocation.HOST
        )
        self._kept: dict[int, tuple[np.ndarray, Memory | None]] = {}
        """Each number of logits that was asked for: a run that is under way reads its own."""

    def run(self, place: int, bound: Mapping[str, tuple[int, Shape]], kept: int) -> None:
        """Ask for a run of what lies on the GPU; it may not be over when this returns.

        Args:
            place: of the profile: `PREFILL` or `DECODE`.
            bound: where each input and output lies, and its shape.
            kept: how many of the last tokens' logits are computed.

        Raises:
            ProviderError: TensorRT refuses a shape, or the run.
        """
        context, stream = self._contexts[place], self.device.stream
        self._library.logger.lines.clear()
        for name, (address, shape) in bound.items():
            if name in self.inputs and not context.set_input_shape(name, tuple(shape)):
                raise ProviderError(
                    f"engine: {name}: expected a shape that it was built for, found {tuple(shape)} "
                    f"{self._library.complaint()}"
                )
            context.set_tensor_address(name, address)
        context.set_tensor_address(contract.NUM_LOGITS_TO_KEEP, self._address_of(kept))
        if not context.execute_async_v3(stream.handle):
            raise ProviderError(f"{self._library.name} cannot run the engine {self._library.complaint()}")

    def _address_of(self, kept: int) -> int:
        """Where the number lies that the engine reads, [1] int64."""
        if kept not in self._kept:
            number = self.device.pinned((1,), np.dtype(np.int64))
            number[0] = kept
            memory = None if self._is_kept_on_host else self.device.allocate(number.nbytes)
            if memory is not None:
                self.device.stream.upload(memory.address, number)
            self._kept[kept] = number, memory
        number, memory = self._kept[kept]
        return int(number.ctypes.data) if memory is None else memory.address

    def _context(self, place: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(place, self.device.stream.handle):
            raise ProviderError(f"{self._library.name} cannot make a context of the engine {self._library.complaint()}")
        self.device.stream.synchronize()
        return context


def open_tensorrt_engine(
    bundle: Bundle, options: Cuda, library: Library | None = None, device: Device | None = None
) -> TensorRTEngineSession:
    """The engine of a bundle's folder `tensorrt` that this machine's GPU runs, compared with the manifest.

    Args:
        bundle: with an engine.
        options: which GPU.
        library: TensorRT; None finds the one that the engine was built by.
        device: the GPU; None opens it.

    Raises:
        ProviderError: there is no engine, no GPU that it was made for, no library of its version, or the engine is not
            what the manifest says.
        BundleError, BundleIntegrityError: no engine is made of such a bundle; the engine is stale or damaged.
    """
    expected, folder = tensors(bundle.manifest), tensorrt_engines_folder(bundle)
    record = _fitting(bundle, options.device)
    content = read_tensorrt_engine(folder, record, bundle)
    library = library or Library(record.backend)
    _check_version(record, library)
    device = device or open_device(options)
    where = f"{folder / record.file.path}"
    with device.turn():
        engine = library.open(content)
        if engine is None:
            raise ProviderError(f"{where}: {library.name} cannot open the engine {library.complaint()}")
        check_tensors(expected, library.tensors(engine), where)
        names = tuple(profile.name for profile in record.profiles)
        check_profiles(record.profiles, library.profiles(engine, names), where)
        return TensorRTEngineSession(library, engine, record.profiles, device)


def limits_of(profiles: Sequence[Profile]) -> Limits:
    """How large a run may be that an engine with these profiles takes."""
    prefill, decode = profiles[PREFILL].inputs, profiles[DECODE].inputs
    _, prompt = prefill[contract.INPUT_IDS][2]
    rows, length = decode[contract.ATTENTION_MASK][2]
    past = contract.tensor_name(contract.PAST, 0, contract.PARTS[0])
    return Limits(rows, prompt, prefill[past][2][2], length)


def _fitting(bundle: Bundle, index: int) -> TensorRTEngineRecord:
    """The record of an engine for a GPU."""
    folder = tensorrt_engines_folder(bundle)
    records = read_tensorrt_engines(folder)
    build = f"build one with: prefix-export tensorrt {bundle.root}"
    if not records:
        raise ProviderError(f"provider {TENSORRT_ENGINE!r}: expected an engine in {folder}, found none; {build}")
    capability = gpu_capability(index)
    if capability is None:
        raise ProviderError(
            f"provider {TENSORRT_ENGINE!r}: expected GPU {index} and NVIDIA's driver, found none; install the driver, "
            "or take provider 'cpu'"
        )
    fitting = [record for record in records if _runs_on(record, capability)]
    # Who names the GPU comes before who does not say.
    best = min(fitting, key=lambda record: capability not in record.compute_capabilities, default=None)
    if best is None:
        listed = ", ".join(record.name for record in records)
        if int(capability.split(".", maxsplit=1)[0]) in _NOT_OF_RTX:
            build += " --backend tensorrt on this machine, or take provider 'cuda'"
        else:
            build += f" --compute-capability {capability}"
        raise ProviderError(
            f"provider {TENSORRT_ENGINE!r}: expected an engine for compute capability {capability}, found {listed}; "
            f"{build}"
        )
    return best


def _runs_on(record: TensorRTEngineRecord, capability: str) -> bool:
    if record.compute_capabilities:
        return capability in record.compute_capabilities
    major, minor = map(int, capability.split("."))
    return record.backend == "tensorrt" or ((major, minor) >= _LEAST_OF_RTX and major not in _NOT_OF_RTX)


def _check_version(record: TensorRTEngineRecord, library: Library) -> None:
    if record.version != library.version and not record.options.get("is_version_compatible"):
        raise ProviderError(
            f"engine {record.name!r}: expected {record.backend} {record.version}, which built it, found "
            f"{library.version}; install that version, or build the engine anew"
        )
