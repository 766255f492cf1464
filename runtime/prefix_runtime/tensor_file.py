"""safetensors files, mapped into memory: an array is a view of the file, not a copy."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import PrefixError

# numpy has no bfloat16: such a tensor is widened to float32 when it is read.
_NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

# A prefix has two tensors a layer: a header beyond this is not of one, and is refused before it is parsed.
_MAX_HEADER_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place in the file: safetensors' name of its dtype, its shape, its bytes' range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file whose tensors are read as views of the mapped file.

    Attributes:
        path: the file.
        metadata: the header's free text, str to str.
        tensors: name to `TensorInfo`, in the header's order.

    Raises:
        PrefixError: the file is missing, unreadable, truncated or not safetensors.

    Source: the safetensors format; the library (0.8) validates the header, bounds and overlaps before anything is used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                _check_header_length(file)
                with safe_open(str(self.path), framework="np") as checked:
                    self.metadata: dict[str, str] = dict(checked.metadata() or {})
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (SafetensorError, OSError, ValueError) as error:
            raise PrefixError(f"{self.path}: expected a whole safetensors file, found {_reason(error)}") from error
        self.tensors = self._read_header()

    def _read_header(self) -> dict[str, TensorInfo]:
        length = int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8 : 8 + length])
        header.pop("__metadata__", None)
        data = 8 + length
        return {
            name: TensorInfo(
                entry["dtype"],
                tuple(entry["shape"]),
                data + entry["data_offsets"][0],
                data + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }

    def array(self, name: str) -> np.ndarray:
        """The tensor, read-only; float32 and float16 as views of the file, bfloat16 widened to float32.

        Raises:
            PrefixError: the tensor is of another dtype.
        """
        info = self.tensors[name]
        dtype = _NUMPY_DTYPES.get(info.dtype)
        if dtype is None:
            raise PrefixError(
                f"{self.path}: tensor {name!r}: expected float32, float16 or bfloat16, found {info.dtype}"
            )
        count = (info.stop - info.start) // np.dtype(dtype).itemsize
        if not count:
            return np.empty(info.shape, np.float32 if info.dtype == "BF16" else dtype)  # of nothing there is no view
        flat = np.frombuffer(self._map, dtype=dtype, count=count, offset=info.start)
        if info.dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
            flat.flags.writeable = False
        return flat.reshape(info.shape)


def _check_header_length(file: BinaryIO) -> None:
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes (at most {_MAX_HEADER_BYTES} are read)")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
