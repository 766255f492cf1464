"""Files from outside, opened so that nothing in them runs and nothing is taken into memory before it was looked at.

Three kinds, told apart by their first bytes: safetensors; what `torch.save` writes; numpy's `.npy`. A pickle is scanned
before torch unpickles it with `weights_only=True` (torch 2.13): of what it may name there are dense tensors, their
storages and dictionaries. Sparse tensors, whose indices torch does not check (CVE-2025-62164), are refused by the scan.
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
_MOST_LEGACY_BYTES = 4 << 30  # such a file is read as a whole
_LEGACY_PICKLES = 5  # magic number, protocol, system, what was saved, keys of its storages

_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_PERMITTED = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        # Of DeepSpeed: the shapes of its parameters, the names of some modules.
        "torch Size",
        "__builtin__ set",
        *(f"torch {name}Storage" for name in _STORAGES),
    }
)
_NESTED = ("state_dict", "model_state_dict", "module", "model", "state")
"""Under which training loops keep a model's weights, beside their own state."""
_DEEPEST = 3
_MOST_IN_SEQUENCE = 4096


class Tensors(ABC):
    """The tensors of one file, by name; an array that stands alone has the empty name."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Their shapes, by name, in the file's order."""

    @abstractmethod
    def array(self, name: str) -> np.ndarray:
        """One of them, in float32 or float16.

        Raises:
            CheckpointError, PrefixError: it is of another dtype.
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
    """What `torch.save` wrote."""

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
        except Exception as error:  # numpy's header is Python text: parsing it raises much
            raise CheckpointError(f"{path}: expected a whole .npy file of numbers, found {_reason(error)}") from error
        if not np.issubdtype(self._array.dtype, np.floating):
            raise CheckpointError(f"{path}: expected floating point, found {self._array.dtype}")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"": self._array.shape}

    def array(self, name: str) -> np.ndarray:
        del name
        kept = self._array.astype(np.float32) if self._array.dtype != np.float16 else np.asarray(self._array)
        return np.ascontiguousarray(kept)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: as it was named: a file or a folder.
        weights: its file of tensors.
        notes: why that file was taken, for a user, a line each.
    """

    path: Path
    weights: Path
    notes: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> Tensors:
        """Those of the file.

        Raises:
            CheckpointError, PrefixError: it is of no known kind, damaged, or holds more than tensors.
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
        """Of the file of tensors."""
        return sha256_of_file(self.weights)

    def config_path(self, name: str) -> Path:
        """Where a configuration lies, or would lie."""
        return self.weights.parent / name

    def config(self, name: str) -> Mapping[str, Any] | None:
        """A configuration beside the tensors, or None.

        Raises:
            CheckpointError: it is no JSON object.
        """
        path = self.config_path(name)
        return read_json(path) if path.is_file() else None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file or folder; see `folder.find_weights`.

    Raises:
        CheckpointError: nothing is there, or nothing that could be one.
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
    """A configuration.

    Raises:
        CheckpointError: it is too large, or no JSON object.
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
    what = other_kind(path) if tensors is None else None
    if tensors == "safetensors" or (tensors is what is None and path.suffix == ".safetensors"):
        return _Mapped(path)
    if tensors == "numpy":
        return _Array(path)
    if tensors is None:
        raise CheckpointError(
            f"{path}: expected safetensors, a checkpoint of torch.save's or an .npy file, found "
            f"{what or 'a file of another kind'}"
        )
    return _Pickled(path, dict(_named(path, _unpickled(path, is_zip=tensors == "zip"))))


def _unpickled(path: Path, *, is_zip: bool) -> Any:
    """What torch makes of a file whose pickles name nothing but dense tensors."""
    import torch

    try:
        if is_zip:
            _scan(path, [_pickle_of_zip(path)])
        else:
            _scan_legacy(path)
        if path.suffix == ".safetensors":  # by whose name torch would go
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
        # torch finds entries whatever the case of their names: what is scanned has to be what it finds.
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
    """Scan a file that torch wrote before 1.6: pickles, and behind them the bytes of storages."""
    if path.stat().st_size > _MOST_LEGACY_BYTES:
        raise CheckpointError(
            f"{path}: expected at most {_MOST_LEGACY_BYTES} bytes in torch's old format, found a larger file; load it "
            "and save it again"
        )
    # Mapped: a file would take memory for as much as a damaged pickle says that it holds.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        _scan(path, [mapped] * _LEGACY_PICKLES)


def _scan(path: Path, pickles: Sequence[bytes | mmap.mmap]) -> None:
    """Refuse pickles that name what is no dense tensor, or that name it in a way that torch.save does not."""
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
    """The tensors of a state dict, or the one that was saved alone."""
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
            continue  # a step or an epoch; nothing that a reader asks for
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: tensor {name!r}: expected a dense tensor, found {tensor.layout}")
        # A view may repeat what is stored: a few bytes that would be terabytes.
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
    # torch's own advice is to load it with code and all.
    return "a damaged pickle" if "weights_only" in text else text[:200]
