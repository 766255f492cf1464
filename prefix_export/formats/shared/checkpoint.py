"""Open files from outside: no code in them runs, and sizes are checked before data is read into memory.

The first bytes decide between three kinds: safetensors, files of `torch.save`, and numpy's `.npy`. A pickle is scanned
before torch unpickles it with `weights_only=True` (torch 2.13). The scan permits dense tensors, their storages and
dictionaries. It refuses sparse tensors, because torch does not check their indices (CVE-2025-62164).
"""

from __future__ import annotations

import errno
import json
import mmap
import pickletools
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_runtime.files import read_regular, sha256_of_file
from prefix_runtime.prefix.tensor_file import TensorFile

from .folder import find_weights
from .signature import kind, other_kind

if TYPE_CHECKING:
    import torch

_MOST_CONFIG_BYTES = 1 << 20
_MOST_PICKLE_BYTES = 64 << 20
_MOST_LEGACY_BYTES = 4 << 30  # torch reads such a file as a whole
_LEGACY_PICKLES = 5  # magic number, protocol, system, saved object, keys of its storages

_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_PERMITTED = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        # DeepSpeed saves the shapes of parameters and the names of some modules.
        "torch Size",
        "__builtin__ set",
        *(f"torch {name}Storage" for name in _STORAGES),
    }
)
_NESTED = ("state_dict", "model_state_dict", "module", "model", "state")
"""Keys under which training loops save a model's weights, beside their own state."""
_DEEPEST = 3
_MOST_IN_SEQUENCE = 4096


class Tensors(ABC):
    """The tensors of one file, by name. An array without a name has the empty name."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes by name, in the file's order."""

    @abstractmethod
    def array(self, name: str) -> np.ndarray:
        """One tensor, in float32 or float16.

        Raises:
            CheckpointError, PrefixError: the tensor has a dtype that is not floating point.
        """


class _Mapped(Tensors):
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)
        self.metadata = self._file.metadata

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(info.shape) for name, info in self._file.tensors.items()}

    def array(self, name: str) -> np.ndarray:
        return self._file.array(name)


class _Pickled(Tensors):
    """A file of `torch.save`."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self._path, self._tensors = path, tensors

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def array(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{self._path}: tensor {name!r}: expected floating point, found {tensor.dtype}")
        array: np.ndarray = tensor.detach().float().contiguous().numpy()
        return array


class _Array(Tensors):
    """A `.npy` file."""

    def __init__(self, path: Path) -> None:
        try:
            self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy's header is Python text: parsing it can raise almost any exception
            raise CheckpointError(f"{path}: expected a whole .npy file of numbers, found {_reason(error)}") from error
        if not np.issubdtype(self._array.dtype, np.floating):
            raise CheckpointError(f"{path}: expected floating point, found {self._array.dtype}")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"": self._array.shape}

    def array(self, name: str) -> np.ndarray:
        del name
        array = self._array.astype(np.float32) if self._array.dtype != np.float16 else np.asarray(self._array)
        return np.ascontiguousarray(array)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: the file or folder that the user named.
        weights: the file of tensors.
        notes: one line for each reason, for the user, why this file was chosen.
    """

    path: Path
    weights: Path
    notes: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> Tensors:
        """The tensors of the file.

        Raises:
            CheckpointError, PrefixError: the file is of an unknown kind, is damaged, or holds more than tensors.
        """
        return _open_tensors(self.weights)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Tensors`."""
        return self.tensors.shapes

    @property
    def metadata(self) -> Mapping[str, str]:
        """The free text of a safetensors file."""
        return self.tensors.metadata if isinstance(self.tensors, _Mapped) else {}

    def array(self, name: str) -> np.ndarray:
        """See `Tensors`."""
        return self.tensors.array(name)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file of tensors, in hexadecimal."""
        return sha256_of_file(self.weights)

    def config_path(self, name: str) -> Path:
        """The path of a configuration beside the tensors, whether it exists or not."""
        return self.weights.parent / name

    def config(self, name: str) -> Mapping[str, Any] | None:
        """A configuration beside the tensors, or None if there is none.

        Raises:
            CheckpointError: the file is not a JSON object.
        """
        path = self.config_path(name)
        return read_json(path) if path.is_file() else None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file or folder; see `folder.find_weights`.

    Raises:
        CheckpointError: the path does not exist, or is neither a file nor a folder with one checkpoint.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: expected a trained prefix, a file or a folder, found nothing there")
    if path.is_file():
        return Checkpoint(path, path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a trained prefix, a file or a folder, found a pipe or a device")
    weights = find_weights(path)
    return Checkpoint(path, weights.weights, weights.notes)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a configuration.

    Raises:
        CheckpointError: the file is too large, or is not a JSON object.
    """
    try:
        text = read_regular(path, _MOST_CONFIG_BYTES).decode("utf-8-sig")  # editors on Windows put a mark before it
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise CheckpointError(
                f"{path}: expected at most {_MOST_CONFIG_BYTES} bytes of JSON, found a larger file"
            ) from error
        raise CheckpointError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _open_tensors(path: Path) -> Tensors:
    tensors = kind(path)
    other = other_kind(path) if tensors is None else None
    if tensors == "safetensors" or (tensors is other is None and path.suffix == ".safetensors"):
        return _Mapped(path)
    if tensors == "numpy":
        return _Array(path)
    if tensors is None:
        raise CheckpointError(
            f"{path}: expected safetensors, a checkpoint of torch.save's or an .npy file, found "
            f"{other or 'a file of another kind'}"
        )
    return _Pickled(path, dict(_named(path, _unpickled(path, is_zip=tensors == "zip"))))


def _unpickled(path: Path, *, is_zip: bool) -> Any:
    """The object that torch loads from a file, if its pickles name only dense tensors."""
    import torch

    try:
        if is_zip:
            _scan(path, [_pickle_of_zip(path)])
        else:
            _scan_legacy(path)
        if path.suffix == ".safetensors":  # torch would trust the name
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes torch, pickle and zipfile raise almost anything
        raise CheckpointError(
            f"{path}: expected a whole checkpoint that torch.save wrote, found {_reason(error)}"
        ) from error


def _pickle_of_zip(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(f"{path}: expected entries as torch.save stores them, found compressed ones")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise CheckpointError(f"{path}: expected entries as large as the file at the most, found larger ones")
        # torch ignores the case of names of entries: the scan has to read the entry that torch will read.
        names = [entry.filename.lower() for entry in entries]
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1 or not pickles[0].filename.endswith("/data.pkl") or len(set(names)) < len(names):
            raise CheckpointError(
                f"{path}: expected a checkpoint of torch.save's, found a zip file of another kind; unpack an archive "
                "first"
            )
        if pickles[0].file_size > _MOST_PICKLE_BYTES:
            raise CheckpointError(
                f"{path}: expected at most {_MOST_PICKLE_BYTES} bytes of pickle, found {pickles[0].file_size}"
            )
        return archive.read(pickles[0])


def _scan_legacy(path: Path) -> None:
    """Scan a file in the format before torch 1.6: pickles, followed by the bytes of storages."""
    if path.stat().st_size > _MOST_LEGACY_BYTES:
        raise CheckpointError(
            f"{path}: expected at most {_MOST_LEGACY_BYTES} bytes in torch's old format, found a larger file; load it "
            "and save it again"
        )
    # Map the file: reading it would allocate whatever size a damaged pickle claims.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        _scan(path, [mapped] * _LEGACY_PICKLES)


def _scan(path: Path, pickles: Sequence[bytes | mmap.mmap]) -> None:
    """Refuse pickles that name anything but dense tensors, or that use operations that torch.save does not use."""
    for each in pickles:
        for operation, argument, _ in pickletools.genops(each):  # type: ignore[arg-type]  # reads as a file does
            if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "BYTEARRAY8"):
                raise _refused(path, f"the pickle operation {operation.name}")
            if operation.name == "GLOBAL" and argument not in _PERMITTED:
                raise _refused(path, str(argument).replace(" ", "."))


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected a pickle of dense tensors alone, found {reason[:80]!r}, which is not loaded; save the state "
        "dict as safetensors where the checkpoint was made"
    )


def _named(path: Path, content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a state dict or of a sequence, or a single tensor."""
    import torch

    if isinstance(content, torch.Tensor):
        content = {"": content}
    if isinstance(content, list | tuple):
        content = dict(_numbered(content))
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected tensors by name, found {type(content).__name__}")
    for _ in range(_DEEPEST):
        nested = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            break
        content = nested
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
            continue  # such as a step or an epoch, which no reader needs
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: tensor {name!r}: expected a dense tensor, found {tensor.layout}")
        # A view may repeat its storage: a few bytes could become terabytes.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected no more numbers than are stored, found shape {list(tensor.shape)}"
            )
        yield name, tensor


def _numbered(content: Sequence[Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors in a sequence, or in a sequence of sequences, by their places: `0`, or `0.1`."""
    for index, each in enumerate(content[:_MOST_IN_SEQUENCE]):
        if isinstance(each, list | tuple) and not start:
            yield from _numbered(each, f"{index}.")
        else:
            yield f"{start}{index}", each


def _reason(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    # torch advises weights_only=False here, which would run the file's code: do not repeat that.
    return "a damaged pickle" if "weights_only" in text else text[:200]
