"""Read and check the header of a GGUF file before transformers loads the weights.

Source: ggml-org/ggml, docs/gguf.md (GGUF version 3); the package gguf gives the sizes of tensor types.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefix_export.errors import ModelError

Value = int | float | bool | str
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
_MOST_TEXT = 1 << 20
_MOST_ITEMS = 1 << 24
_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")
INSTALL = "pip install 'prefix-export[gguf]'"


@dataclass(frozen=True)
class Tensor:
    """A tensor's place: the number of its type, its shape, and its offset from the first tensor in bytes."""

    kind: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        path: the path of the file.
        values: numbers and texts by key, without arrays.
        tensors: the tensors' places by name.
        data_start: the position of the first tensor, in bytes.
    """

    path: Path
    values: Mapping[str, Value]
    tensors: Mapping[str, Tensor]
    data_start: int

    @property
    def architecture(self) -> str:
        """The architecture, as llama.cpp names it."""
        return str(self.values.get("general.architecture", ""))

    def value(self, key: str) -> Value | None:
        """A value under the architecture's name, such as `context_length`; None if there is none."""
        return self.values.get(f"{self.architecture}.{key}")


def read_header(name: str, path: Path) -> Header:
    """The header of a GGUF file that holds a whole model.

    Args:
        name: the model's name, for messages.
        path: the path of the file.

    Raises:
        ModelError: the file is not a GGUF file, is damaged, or is one part of several, or the package gguf is not
            installed; the message says what to do.
        OSError: the file cannot be read.
    """

    def refusal(expected: str, actual: str) -> ModelError:
        return ModelError(f"model {name!r}: expected {expected}, found {actual}")

    with path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        _check_start(start, refusal)
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Cursor(data).header(path)
        except (struct.error, ValueError, OverflowError, IndexError) as error:
            raise refusal("a whole GGUF file", f"one that is cut off or damaged in its header ({error})") from error
    _check_is_whole(header, size, refusal)
    return header


_Refusal = Callable[[str, str], ModelError]


def _check_start(start: bytes, refusal: _Refusal) -> None:
    if len(start) < 8 or start[:4] != _MAGIC:
        raise refusal("a GGUF file", f"a file that begins with {start[:4]!r} in place of {_MAGIC!r}")
    (version,) = struct.unpack("<I", start[4:])
    (swapped,) = struct.unpack(">I", start[4:])
    if version in _VERSIONS:
        return
    if swapped in (1, *_VERSIONS):
        raise refusal(
            "a GGUF file in little-endian byte order", "one in big-endian; convert it with gguf-convert-endian"
        )
    raise refusal("GGUF version 2 or 3", f"version {version}; convert the original model again with a new llama.cpp")


def _check_is_whole(header: Header, size: int, refusal: _Refusal) -> None:
    count = header.values.get("split.count")
    if (isinstance(count, int) and count > 1) or _SPLIT.search(header.path.stem):
        raise refusal("a whole GGUF file", "one part of several; merge them: llama-gguf-split --merge FIRST OUTPUT")
    if not header.architecture:
        raise refusal("a GGUF file with general.architecture", "one without; it holds no model")
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise refusal("the package gguf to load the file", f"it not installed; {INSTALL}") from error
    sizes = {int(kind): block for kind, block in GGML_QUANT_SIZES.items()}
    for tensor_name, tensor in header.tensors.items():
        if tensor.kind not in sizes:
            raise refusal("tensor types that the package gguf knows", f"type {tensor.kind} of {tensor_name!r}")
        elements, nbytes = sizes[tensor.kind]
        end = header.data_start + tensor.offset + math.prod(tensor.shape) // elements * nbytes
        if end > size:
            raise refusal(
                "a whole GGUF file",
                f"one that is cut off: the tensor {tensor_name!r} ends at byte {end:,} of {size:,}; fetch it again",
            )


class _Cursor:
    """Reads values one after another; raises `struct.error` or `ValueError` for a damaged file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, len(_MAGIC) + 4

    def header(self, path: Path) -> Header:
        tensor_count, value_count = self._count(), self._count()
        values = {}
        for _ in range(value_count):
            key = self._text()
            value = self._value(self._number("I"))
            if value is not None:
                values[key] = value
        tensors = dict(self._tensor() for _ in range(tensor_count))
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment {alignment!r}")
        return Header(path, values, tensors, -(-self._at // alignment) * alignment)

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self._data, self._at)
        self._at += struct.calcsize(f"<{kind}")
        number: int = value
        return number

    def _count(self) -> int:
        count = self._number("Q")
        if count > _MOST_ITEMS:
            raise ValueError(f"{count} items at byte {self._at}")
        return count

    def _text(self) -> str:
        length = self._number("Q")
        if length > min(_MOST_TEXT, len(self._data) - self._at):
            raise ValueError(f"a text of {length} bytes at byte {self._at}")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Value | None:
        if kind == _ARRAY:
            self._skip_array()
            return None
        return self._text() if kind == _STRING else self._number(_scalar_format(kind))

    def _skip_array(self) -> None:
        kind, count = self._number("I"), self._count()
        if kind == _STRING:
            for _ in range(count):
                length = self._number("Q")
                self._at += length
        else:
            self._at += count * struct.calcsize(f"<{_scalar_format(kind)}")

    def _tensor(self) -> tuple[str, Tensor]:
        name, axes = self._text(), self._number("I")
        if axes > _MOST_AXES:
            raise ValueError(f"{axes} axes of the tensor {name[:80]!r}")
        shape = tuple(self._number("Q") for _ in range(axes))
        return name, Tensor(self._number("I"), shape, self._number("Q"))


def _scalar_format(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")
    return _SCALARS[kind]
