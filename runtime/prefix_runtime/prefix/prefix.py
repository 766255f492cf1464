"""`Prefix`, the central immutable value, and its canonical file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors.numpy import save as serialize

from prefix_runtime.errors import PrefixError
from prefix_runtime.files import check_sha256, read_regular, write_file_atomically

from .tensor_file import TensorFile, reason

DECODER, CROSS, ENCODER = SITES = ("decoder", "cross", "encoder")
"""Attention sites: decoder self-attention, decoder-to-encoder attention, encoder self-attention."""

TEXT_HAS_BEGUN = "text_has_begun"
"""Metadata, "true" if a prefix is, or holds, a text's keys and values: what follows begins without special tokens."""

FORMAT = "prefix-export.prefix"
FORMAT_VERSION = 1
_EMBEDDINGS = "embeddings"
_AXES = 3  # of a key or a value
_TENSOR_NAME = re.compile(r"(decoder|cross|encoder)\.(0|[1-9][0-9]{0,3})\.(key|value)")


@dataclass(frozen=True, eq=False)
class LayerPrefix:
    """One layer's prefix: `key` and `value`, each [num_key_value_heads, prefix_length, head_dim], read-only.

    A layer that was left out when the others were trained has a length of 0.
    A key of a model with rotary positions is stored after rotation, as it was trained.
    """

    key: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class Source:
    """Where a prefix came from: the checkpoint's format and the SHA-256 of its file."""

    format: str
    sha256: str


@dataclass(frozen=True, eq=False)
class Prefix:
    """Trained keys and values for every attention layer of a frozen model; equal and hashed by content.

    Attributes:
        sites: for each attention site (see `SITES`) one `LayerPrefix` per layer; float32 or float16, finite.
        position_base: the position of the first token of text: `prefix_length` (PEFT; Li and Liang's GPT-2 code;
            P-tuning v2) or 0 (Li and Liang's BART code; AdapterHub).
        base_fingerprint: of the base model that it was trained on, or None where the source does not tell.
        source: where it came from, or None.
        head: the task's own head weights, by name, for methods that train one.
        metadata: free text, str to str.
        embeddings: of an encoder's soft prompt, which stand before those of the text, [prefix_length, hidden_size]
            float32 or float16; None where keys and values are all there is. Then there may be no sites.

    Raises:
        PrefixError: a wrong number of axes, shapes or dtypes that differ between layers, NaN, infinity.

    Source: Li and Liang, "Prefix-Tuning", ACL 2021, equation 3: the activations of the prefix are free parameters.

    >>> import numpy as np
    >>> key = np.zeros((2, 5, 8), np.float32)
    >>> Prefix({"decoder": (LayerPrefix(key, key),)}, position_base=5).prefix_length
    5
    """

    sites: Mapping[str, tuple[LayerPrefix, ...]]
    position_base: int
    base_fingerprint: str | None = None
    source: Source | None = None
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    embeddings: np.ndarray | None = None

    def __post_init__(self) -> None:
        frozen = {
            site: tuple(LayerPrefix(_read_only(layer.key), _read_only(layer.value)) for layer in layers)
            for site, layers in self.sites.items()
        }
        object.__setattr__(self, "sites", MappingProxyType(frozen))
        head = {name: _read_only(array) for name, array in self.head.items()}
        object.__setattr__(self, "head", MappingProxyType(head))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
        if self.embeddings is not None:
            object.__setattr__(self, "embeddings", _read_only(self.embeddings))
        self._check()
        object.__setattr__(self, "position_base", int(self.position_base))  # numpy's whole numbers are no JSON

    def _check(self) -> None:
        unknown = sorted(set(self.sites) - set(SITES))
        if unknown or not all(self.sites.values()) or (not self.sites and self.embeddings is None):
            raise PrefixError(f"expected at least one layer at the sites {', '.join(SITES)}, found {unknown or 'none'}")
        if self.embeddings is not None:
            _check_embeddings(self.embeddings)
        for name, array in self._arrays():
            _check_axes(name, array)
        for name, array in self._arrays():
            _check_array(name, array, self.dtype, self.prefix_length)
        for name, array in self.head.items():
            _check_dtype(f"head.{name}", array)
            _check_finite(f"head.{name}", array)
        if not all(isinstance(text, str) for item in self.metadata.items() for text in item):
            raise PrefixError(f"metadata: expected texts by name, found {dict(self.metadata)!r:.80}")
        # The file keeps it as text, where neither 5.0 nor True is a whole number.
        whole = isinstance(self.position_base, int | np.integer) and not isinstance(self.position_base, bool)
        if not whole or self.position_base not in (0, self.prefix_length):
            raise PrefixError(
                f"position_base: expected 0 or the prefix length {self.prefix_length}, found {self.position_base!r}"
            )

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for site in SITES:
            for index, layer in enumerate(self.sites.get(site, ())):
                yield f"{site}.{index}.key", layer.key
                yield f"{site}.{index}.value", layer.value

    @property
    def prefix_length(self) -> int:
        """Positions that the prefix takes in every layer."""
        if not self.sites:
            assert self.embeddings is not None
            return int(self.embeddings.shape[0])
        lengths = (int(array.shape[1]) for _, array in self._arrays())
        return next(filter(None, lengths), 0)

    def length_at(self, site: str) -> int:
        """Positions that the prefix takes at one attention site: 0 if it has no keys and values there."""
        return self.prefix_length if site in self.sites else 0

    @property
    def dtype(self) -> np.dtype:
        """float32 or float16, the same for every key and value."""
        if not self.sites:
            assert self.embeddings is not None
            return self.embeddings.dtype
        return next(iter(self.sites.values()))[0].key.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, and of embeddings."""
        held = self.embeddings.nbytes if self.embeddings is not None else 0
        return held + sum(array.nbytes for _, array in self._arrays())

    @cached_property
    def content_hash(self) -> str:
        """SHA-256, in hexadecimal, of everything that the prefix holds."""
        digest = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        for name, array in self._tensors().items():
            digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.content_hash == other.content_hash if isinstance(other, Prefix) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def _tensors(self) -> dict[str, np.ndarray]:
        head = {f"head.{name}": self.head[name] for name in sorted(self.head)}
        embeddings = {_EMBEDDINGS: self.embeddings} if self.embeddings is not None else {}
        return dict(self._arrays()) | embeddings | head

    def _header(self) -> dict[str, str]:
        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "position_base": str(self.position_base),
            "metadata": json.dumps(dict(self.metadata), sort_keys=True),
        }
        if self.base_fingerprint:
            header["base_fingerprint"] = self.base_fingerprint
        if self.source:
            header["source_format"] = self.source.format
            header["source_sha256"] = self.source.sha256
        return header

    def describe(self) -> dict[str, str]:
        """What the prefix is, for people."""
        description = {"format": "prefix file"}
        for layers in list(self.sites.values())[:1]:
            heads, _, head_dim = layers[0].key.shape
            description |= {
                "sites": ", ".join(self.sites),
                "layers": str(len(layers)),
                "key/value heads": str(heads),
                "head size": str(head_dim),
            }
        if self.embeddings is not None:
            description["soft prompt"] = f"{self.embeddings.shape[0]} embeddings of {self.embeddings.shape[1]}"
        if self.head:
            description["head"] = ", ".join(sorted(self.head))
        return description | {
            "prefix length": str(self.prefix_length),
            "position base": str(self.position_base),
            "dtype": str(self.dtype),
            "base model": self.base_fingerprint or "unknown",
            "source": self.source.format if self.source else "unknown",
            "content": f"sha256:{self.content_hash}",
        }

    def save(self, path: str | Path) -> None:
        """Write the canonical file, whole or not at all, replacing what was there.

        One safetensors file: `{site}.{layer}.key`, `{site}.{layer}.value`, `embeddings`, `head.{name}`; the rest
        in its metadata.
        """
        tensors = {name: np.asarray(array, order="C") for name, array in self._tensors().items()}
        write_file_atomically(Path(path), serialize(tensors, metadata=self._header()))

    @classmethod
    def load(cls, path: str | Path, sha256: str | None = None) -> Prefix:
        """The prefix in a canonical file, which is read into memory whole.

        Args:
            path: the file; a regular one.
            sha256: of its bytes, in hexadecimal; None does not compare them.

        Raises:
            PrefixError: the file is missing, damaged, of another kind or a newer version, or holds what is no prefix.
            BundleIntegrityError: its bytes have another SHA-256.
        """
        content = _content(Path(path))
        if sha256 is not None:
            check_sha256(Path(path), hashlib.sha256(content).hexdigest(), sha256)
        file = TensorFile(path, content)
        try:
            return _from_tensor_file(file)
        except PrefixError as error:
            text = str(error)
            raise PrefixError(text if text.startswith(str(file.path)) else f"{file.path}: {text}") from error


def _content(path: Path) -> bytes:
    try:
        return read_regular(path)
    except (OSError, ValueError) as error:  # a path that cannot be one is a ValueError
        raise PrefixError(f"{path}: expected a whole safetensors file, found {reason(error)}") from error


def is_prefix_file(file: TensorFile) -> bool:
    """Whether a safetensors file says that it is a canonical prefix file, of whatever version."""
    return file.metadata.get("format") == FORMAT


def _from_tensor_file(file: TensorFile) -> Prefix:
    if not is_prefix_file(file):
        raise PrefixError(
            f"expected a prefix file (metadata format {FORMAT!r}), found format {file.metadata.get('format')!r}"
        )
    version = _integer(file.metadata, "format_version")
    if not 1 <= version <= FORMAT_VERSION:
        raise PrefixError(f"expected format version {FORMAT_VERSION} or older, found {version}; update prefix-runtime")
    head = {name.removeprefix("head."): file.array(name) for name in file.tensors if name.startswith("head.")}
    source = None
    if "source_format" in file.metadata:
        source = Source(file.metadata["source_format"], file.metadata.get("source_sha256", ""))
    return Prefix(
        sites=_read_sites(file),
        position_base=_integer(file.metadata, "position_base"),
        base_fingerprint=file.metadata.get("base_fingerprint"),
        source=source,
        head=head,
        metadata=_read_metadata(file.metadata.get("metadata", "{}")),
        embeddings=file.array(_EMBEDDINGS) if _EMBEDDINGS in file.tensors else None,
    )


def _read_sites(file: TensorFile) -> dict[str, tuple[LayerPrefix, ...]]:
    sites: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for name in file.tensors:
        if name.startswith("head.") or name == _EMBEDDINGS:
            continue
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise PrefixError(f"expected tensors like 'decoder.0.key', found {name!r}")
        site, layer, part = match.groups()
        sites.setdefault(site, {}).setdefault(int(layer), {})[part] = file.array(name)
    return {site: _in_order(site, sites[site]) for site in SITES if site in sites}


def _in_order(site: str, layers: dict[int, dict[str, np.ndarray]]) -> tuple[LayerPrefix, ...]:
    for index in range(len(layers)):
        if set(layers.get(index, ())) != {"key", "value"}:
            raise PrefixError(
                f"expected a key and a value for each of the {len(layers)} layers of {site}, "
                f"found layer {index} incomplete"
            )
    return tuple(LayerPrefix(layers[index]["key"], layers[index]["value"]) for index in range(len(layers)))


def _read_metadata(text: str) -> dict[str, str]:
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PrefixError("metadata: expected a JSON object, found text that is none") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PrefixError("metadata: expected a JSON object of texts")
    return metadata


def _integer(metadata: Mapping[str, str], key: str) -> int:
    text = metadata.get(key, "")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise PrefixError(f"metadata {key}: expected a whole number, found {text[:40]!r}")
    return int(text)


def _read_only(array: np.ndarray) -> np.ndarray:
    # An array that can be written to, if only through what it is a view of, may be changed by its owner later on: the
    # prefix keeps a copy of its own.
    frozen = np.array(array) if _is_writable(array) else array
    frozen.flags.writeable = False
    return frozen


def _is_writable(array: np.ndarray) -> bool:
    return bool(array.flags.writeable) or (isinstance(array.base, np.ndarray) and _is_writable(array.base))


def _check_embeddings(array: np.ndarray) -> None:
    if array.ndim != 2 or 0 in array.shape:
        raise PrefixError(
            f"{_EMBEDDINGS}: expected shape [prefix_length, hidden_size], neither of them 0, found {list(array.shape)}"
        )
    _check_dtype(_EMBEDDINGS, array)
    _check_finite(_EMBEDDINGS, array)


def _check_dtype(name: str, array: np.ndarray) -> None:
    if array.dtype not in (np.float32, np.float16):
        raise PrefixError(f"{name}: expected float32 or float16, found {array.dtype}")


def _check_axes(name: str, array: np.ndarray) -> None:
    if array.ndim != _AXES or 0 in (array.shape[0], array.shape[2]):
        raise _misshapen(name, array)
    _check_dtype(name, array)


def _misshapen(name: str, array: np.ndarray) -> PrefixError:
    return PrefixError(
        f"{name}: expected shape [num_key_value_heads, prefix_length, head_dim], none of them 0, "
        f"found {list(array.shape)}"
    )


def _check_array(name: str, array: np.ndarray, dtype: np.dtype, length: int) -> None:
    if not length:  # of no layer
        raise _misshapen(name, array)
    if array.dtype != dtype:
        raise PrefixError(f"{name}: expected {dtype} as in the first layer, found {array.dtype}")
    if array.shape[1] not in (0, length):
        raise PrefixError(f"{name}: expected prefix length {length} as in the first layer, found {array.shape[1]}")
    _check_finite(name, array)


def _check_finite(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        index = np.argwhere(~np.isfinite(array))[0].tolist()
        raise PrefixError(f"{name}: expected finite numbers, found {array[tuple(index)]} at {index}")
