"""TensorRT's Python bindings: finding them, what they log, opening an engine and reading what it takes and gives."""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType
from typing import Any

from prefix_runtime.bundle.graph_contract import NUM_LOGITS_TO_KEEP
from prefix_runtime.errors import ProviderError

from .profile import Profile, Shape, Tensor

_MODULES = {"tensorrt-rtx": ("tensorrt_rtx_bindings", "tensorrt_rtx"), "tensorrt": ("tensorrt",)}
_INSTALL = {
    "tensorrt-rtx": "pip install 'prefix-runtime[tensorrt-rtx]'",
    "tensorrt": "install NVIDIA's tensorrt for this machine's CUDA (pip install tensorrt, or JetPack)",
}
_SHOWN = {"tensorrt-rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}
_DTYPES = {"INT64": "int64", "INT32": "int32", "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


class Library:
    """TensorRT, or TensorRT for RTX, as its bindings offer it.

    Args:
        backend: "tensorrt-rtx" or "tensorrt".
        module: its bindings; None finds them.

    Attributes:
        backend: as given.
        api: the bindings.
        logger: TensorRT's logger, whose `lines` are the warnings and errors since it was last cleared.

    Raises:
        ProviderError: there are no such bindings here, or they cannot be loaded.
    """

    def __init__(self, backend: str, module: ModuleType | None = None) -> None:
        self.backend = backend
        self.api: Any = module if module is not None else _import(backend)
        self.logger = _logger(self.api)

    @property
    def name(self) -> str:
        """The library and its version, as a person reads it."""
        return f"{_SHOWN[self.backend]} {self.version}"

    @property
    def version(self) -> str:
        """Of the library."""
        return str(self.api.__version__)

    @property
    def has_gpu(self) -> bool:
        """Whether this machine has a GPU, and a driver that knows it."""
        return gpu_capability(0) is not None

    def complaint(self) -> str:
        """The last error that was logged, in one line, in brackets; nothing where there was none."""
        line = " ".join(next(reversed(self.logger.lines), "").split())
        return f"({line[:400]})" if line else ""

    def open(self, content: bytes) -> Any:
        """An engine (`ICudaEngine`), deserialized on this machine's GPU; None where that does not run it."""
        self.logger.lines.clear()
        return self.api.Runtime(self.logger).deserialize_cuda_engine(content)

    def tensors(self, engine: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The inputs and outputs of an engine."""
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        tensors = {
            name: Tensor(name, dtype_name(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
            for name in names
        }
        is_input = {name: engine.get_tensor_mode(name) == self.api.TensorIOMode.INPUT for name in names}
        inputs = tuple(tensor for name, tensor in tensors.items() if is_input[name])
        return inputs, tuple(tensor for name, tensor in tensors.items() if not is_input[name])

    def profiles(self, engine: Any, names: tuple[str, ...]) -> tuple[Profile, ...]:
        """The profiles of an engine, under these names."""
        inputs, _ = self.tensors(engine)

        def ranges(tensor: Tensor, place: int) -> tuple[Shape, Shape, Shape]:
            if tensor.name == NUM_LOGITS_TO_KEEP:
                shapes = engine.get_tensor_profile_values(place, tensor.name)  # unlike its neighbour, the place first
            else:
                shapes = engine.get_tensor_profile_shape(tensor.name, place)
            least, usual, most = (tuple(each) for each in shapes)
            return least, usual, most

        if engine.num_optimization_profiles != len(names):
            raise ProviderError(
                f"engine: expected {len(names)} profiles, {', '.join(names)}, found {engine.num_optimization_profiles}"
            )
        return tuple(
            Profile(name, {tensor.name: ranges(tensor, place) for tensor in inputs}) for place, name in enumerate(names)
        )


def dtype_name(dtype: Any) -> str:
    """The name that numpy has for one of TensorRT's types, or TensorRT's own where it has none."""
    name = str(dtype.name)
    return _DTYPES.get(name, name.lower())


def check_tensors(
    expected: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    actual: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    where: str,
) -> None:
    """Refuse inputs and outputs that are not those that a manifest describes; `where` names them in the message.

    Raises:
        ProviderError
    """
    for kind, wanted, given in zip(("input", "output"), expected, actual, strict=True):
        there = {tensor.name: tensor for tensor in given}
        for tensor in wanted:
            other = there.pop(tensor.name, None)
            if other is None:
                raise ProviderError(f"{where}: {kind} {tensor.name}: expected {tensor}, found none")
            if not _fits(tensor, other):
                raise ProviderError(f"{where}: {kind} {tensor.name}: expected {tensor}, found {other}")
        if there:
            raise ProviderError(f"{where}: expected no {kind} but the manifest's, found {', '.join(sorted(there))}")


def check_profiles(expected: tuple[Profile, ...], actual: tuple[Profile, ...], where: str) -> None:
    """Refuse profiles of other ranges; `where` names them in the message.

    Raises:
        ProviderError
    """
    for wanted, given in zip(expected, actual, strict=True):
        for name, shapes in wanted.inputs.items():
            if (other := given.inputs.get(name)) != shapes:
                raise ProviderError(f"{where}: profile {wanted.name}: {name}: expected {shapes}, found {other}")


def _fits(expected: Tensor, actual: Tensor) -> bool:
    """Whether types and sizes are equal, but that an output's size may be left open."""
    if expected.dtype != actual.dtype or len(expected.shape) != len(actual.shape):
        return False
    return all(theirs in (ours, -1) for ours, theirs in zip(expected.shape, actual.shape, strict=True))


def _import(backend: str) -> ModuleType:
    reason: Exception | None = None
    for name in _MODULES[backend]:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason = reason or error
        except (OSError, RuntimeError) as error:  # its libraries are not there, or not the machine's
            reason = error
            break
    raise ProviderError(
        f"{backend}: expected {_SHOWN[backend]}'s Python bindings, found none that load ({reason}); {_INSTALL[backend]}"
    ) from reason


def gpu_capability(index: int) -> str | None:
    """A GPU's compute capability, as "8.6"; None where there is no such GPU, or no driver.

    Source: CUDA's driver API, which needs no other of its libraries (cuda.h: CUdevice_attribute 75 and 76).
    """
    driver = _driver()
    device, version = ctypes.c_int(0), [ctypes.c_int(0), ctypes.c_int(0)]
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), index) != 0:
        return None
    for number, attribute in zip(version, (75, 76), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device) != 0:
            return None
    return ".".join(str(number.value) for number in version)


def _driver() -> Any:
    """CUDA's driver, initialised; None where there is none, or no GPU that it knows."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        return driver if driver.cuInit(0) == 0 else None
    return None


def _logger(api: Any) -> Any:
    class Logger(api.ILogger):  # type: ignore[misc]  # the base class is the bindings'
        """Keeps warnings and errors, and prints nothing."""

        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.Severity.INTERNAL_ERROR, api.ILogger.Severity.ERROR):
                self.lines.append(message)

    return Logger()
