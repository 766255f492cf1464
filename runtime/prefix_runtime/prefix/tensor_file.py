"""safetensors files, read into memory: an array stays what it is, whatever becomes of the file."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np

from prefix_runtime.checks import quoted
from prefix_runtime.errors import PrefixError
from prefix_runtime.files import open_regular, read_at

# numpy has no bfloat16: such a tensor is widened to float32 when it is read.
_NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Of one number, by safetensors' name of its dtype."""

# A prefix has two tensors a layer: a header beyond this is not of one, and is refused before it is parsed.
_MAX_HEADER_BYTES = 16 << 20
_LENGTH_BYTES = 8
_LARGEST = 2**64 - 1
"""What the format counts with."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place in the file: safetensors' name of its dtype, its shape, its bytes' range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file. Each tensor is read into memory when it is asked for.

    The file is opened once, so all tensors are of one file even if another takes its name. A file that is shortened
    meanwhile is an error; a mapped one would kill the process.

    Args:
        path: the file; a regular one.
        content: its bytes if they were read before; then the path only names it in messages.

    Attributes:
        path: the file.
        metadata: the header's free text, str to str.
        tensors: name to `TensorInfo`, in the header's order.

    Raises:
        PrefixError: the file is missing, unreadable, truncated or not safetensors.

    Source: the safetensors format, and what the library (0.8) refuses: sizes, offsets and holes that do not fit.
    """

    def __init__(self, path: str | Path, content: bytes | None = None) -> None:
        self.path = Path(path)
        self._content = None if content is None else memoryview(content)
        try:
            if self._content is not None:
                size = len(self._content)
            else:
                self._descriptor = open_regular(self.path)
                weakref.finalize(self, os.close, self._descriptor)
                size = os.fstat(self._descriptor).st_size
            header, start = self._header(size)
            self.metadata = _metadata(header.pop("__metadata__", None))
            self.tensors = {name: _info(name, entry, start) for name, entry in header.items()}
            _check_places(self.tensors, start, size)
        except (OSError, ValueError, RecursionError) as error:
            raise PrefixError(f"{self.path}: expected a whole safetensors file, found {reason(error)}") from error

    def _header(self, size: int) -> tuple[dict[str, Any], int]:
        """The header, and where the tensors' bytes begin."""
        length = int.from_bytes(self._read(0, min(_LENGTH_BYTES, size)), "little")
        if size < _LENGTH_BYTES:
            raise ValueError(f"{size} bytes, too small for a header")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes (at most {_MAX_HEADER_BYTES} are read)")
        start = _LENGTH_BYTES + length
        if start > size:
            raise ValueError(f"{size} bytes, fewer than its header's {length}")
        try:
            header = json.loads(bytes(self._read(_LENGTH_BYTES, start)))
        except (ValueError, RecursionError) as error:
            raise ValueError("a header that is no JSON") from error
        if not isinstance(header, dict):
            raise ValueError("a header that is no JSON object")  # what is wrong is the file
        return header, start

    def _read(self, start: int, stop: int) -> memoryview | bytes:
        if self._content is not None:
            return self._content[start:stop]
        return read_at(self._descriptor, start, stop - start)

    def array(self, name: str) -> np.ndarray:
        """The tensor, read-only; float32 and float16 as they are stored, bfloat16 widened to float32.

        Raises:
            PrefixError: the tensor is of another dtype, of a shape that no array has, or cannot be read any more.
        """
        info, where = self.tensors[name], f"{self.path}: tensor {quoted(name)}"
        dtype = _NUMPY_DTYPES.get(info.dtype)
        if dtype is None:
            raise PrefixError(f"{where}: expected float32, float16 or bfloat16, found {info.dtype}")
        try:
            flat = np.frombuffer(self._read(info.start, info.stop), dtype)
            if info.dtype == "BF16":
                flat = (flat.astype(np.uint32) << 16).view(np.float32)
                flat.flags.writeable = False
            return flat.reshape(info.shape)
        except OSError as error:
            raise PrefixError(f"{where}: expected its bytes, found {reason(error)}") from error
        except ValueError as error:  # more axes than numpy has, or sizes beyond its own
            raise PrefixError(
                f"{where}: expected a shape that an array can have, found {quoted(list(info.shape))}"
            ) from error


def _metadata(entry: object) -> dict[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
        raise ValueError("metadata that is not text by name")
    return entry


def _info(name: str, entry: object, start: int) -> TensorInfo:
    """A tensor's entry, checked on its own."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and dtype in _BITS and _are_sizes(shape) and _are_sizes(offsets, 2)):
        raise ValueError(f"tensor {quoted(name)} without a known dtype, a shape and two offsets")
    first, last = offsets
    if first > last or _bits(dtype, shape) != 8 * (last - first):
        raise ValueError(f"tensor {quoted(name)} of {last - first} bytes, which its dtype and shape do not take")
    return TensorInfo(dtype, tuple(shape), start + first, start + last)


def _are_sizes(value: object, count: int | None = None) -> TypeGuard[list[int]]:
    is_list = isinstance(value, list) and count in (None, len(value))
    return is_list and all(type(size) is int and 0 <= size <= _LARGEST for size in cast(list[object], value))


def _bits(dtype: str, shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
        if count > _LARGEST:
            raise ValueError("a tensor of more numbers than can be counted")
    return count * _BITS[dtype]


def _check_places(tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Each tensor begins where the one before it ends, and the last one ends with the file."""
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != start:
            raise ValueError("tensors that overlap, or bytes between them that are none's")
        start = info.stop
    if start != size:
        raise ValueError(f"{size} bytes where its header tells of {start}")


def reason(error: Exception) -> str:
    """What a message says was found where a file could not be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
