"""The bundle's manifest: what it says, how it is written, and what is refused when it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from prefix_runtime.checks import MOST_QUOTED, quoted
from prefix_runtime.errors import BundleError, DuplicateTaskError, TaskNameError, UnknownTaskError
from prefix_runtime.prefix.cache_format import CACHE_TYPES, SCALES_NAME
from prefix_runtime.prefix.geometry import Geometry, LayerGeometry

FORMAT = "prefix-export.bundle"
FORMAT_VERSION = 1
_TASK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}")
# Windows opens a device under these names, whatever the extension.
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What no model comes near: buffers are made by these numbers, and a manifest may come from anywhere.
_MOST_HEADS, _MOST_HEAD_DIM, _MOST_POSITIONS, _MOST_TOKENS = 1 << 12, 1 << 13, 1 << 26, 1 << 24
_MOST_LISTED = 50
"""Tasks that a message lists."""
# What no path inside the bundle has: a drive, a backslash, a part that is empty, `.` or `..`.
_OUTSIDE = re.compile(r"[\\:\0]|(?:^|/)\.{0,2}(?:/|\Z)")
T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: path relative to the bundle with `/`, size in bytes, SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class TaskEntry:
    """A task: its prefix's file, length and position base."""

    file: FileEntry
    prefix_length: int
    position_base: int


@dataclass(frozen=True)
class ModelEntry:
    """The frozen model.

    Attributes:
        name: as the user named it, without a revision.
        architecture: its class.
        fingerprint: of its weights.
        revision: the commit or revision of a Hub id, or None.
    """

    name: str
    architecture: str
    fingerprint: str
    revision: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        producer: name and version of what wrote the bundle.
        model: the frozen model.
        geometry: its shape.
        max_length: positions that prefix and text may take together.
        mode: "feed": the prefix is the graph's initial past; "bake": the graph holds the prefixes, in the order of the
            tasks' names, which are its `task_id`s.
        flavour: "fast": past and present share one buffer (com.microsoft GroupQueryAttention); "portable": standard
            operators, the present is the past and what is new.
        precision: of the weights: "fp32", "fp16", "bf16", "int8" or "int4".
        target: what the graph was made for: "cpu", "cuda", "portable", "web" or "tensorrt".
        graph: the graph's path.
        weight_bytes: of the weights that one decode step reads.
        files: every file but the prefixes and the manifest itself, by path.
        tasks: by name.
        cache: what keys and values are kept in: "fp32", "fp16", "bf16" or "int8".
        block_size: weights that share a scale, at most; None for "fp32", and where each output has one.
        quantizer: how weights were rounded, "rtn" or "hqq"; None for "fp32".
        parity: the certificate that `build` wrote, or None where it was told not to verify.
        generation: "followed": names of the model's generation defaults that the runtime follows; "not_followed": those
            that it does not, with their values. None in bundles of older versions.
    """

    producer: str
    model: ModelEntry
    geometry: Geometry
    max_length: int
    mode: str
    flavour: str
    precision: str
    target: str
    graph: str
    weight_bytes: int
    files: Mapping[str, FileEntry]
    tasks: Mapping[str, TaskEntry] = field(default_factory=dict)
    cache: str = "fp32"
    block_size: int | None = None
    quantizer: str | None = None
    parity: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] | None = None

    @property
    def graph_files(self) -> list[FileEntry]:
        """The graph and its weights."""
        names = (self.graph, f"{self.graph}.data")
        return [self.files[name] for name in names if name in self.files]

    def with_task(self, name: str, entry: TaskEntry) -> Manifest:
        """This manifest with one more task.

        Raises:
            TaskNameError: the name cannot be one.
            DuplicateTaskError: the name is taken.
        """
        check_new_task_name(name, self.tasks)
        return replace(self, tasks={**self.tasks, name: entry})

    def without_task(self, name: str) -> Manifest:
        """This manifest without a task, and without its part of the parity certificate.

        Raises:
            UnknownTaskError: there is none of this name.
        """
        if name not in self.tasks:
            raise unknown_task(name, self.tasks)
        parity = self.parity
        if parity is not None:
            results = {task: result for task, result in parity.get("tasks", {}).items() if task != name}
            parity = {**parity, "tasks": results}
        return replace(self, tasks={task: e for task, e in self.tasks.items() if task != name}, parity=parity)

    def to_json(self) -> str:
        """The manifest's text, the same for the same content."""
        fields = asdict(self)
        fields["files"] = [fields["files"][path] for path in sorted(self.files)]
        fields["tasks"] = dict(sorted(fields["tasks"].items()))
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **fields}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """The manifest in a text; `where` names it in messages.

        Raises:
            BundleError: naming the field, what was expected and what was found.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where}: expected JSON, found text that is none ({error})") from error
        return _read_manifest(_Fields(content, where))


def prefix_path(task: str) -> str:
    """Where a task's prefix lies in the bundle."""
    return f"prefixes/{task}.safetensors"


def check_task_name(name: str) -> None:
    """Refuse a name that cannot name a task, and so a file.

    Raises:
        TaskNameError: empty, absolute, with a separator or `..`, or with other characters than the portable ones.
    """
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise TaskNameError(
            f"task name: expected 1 to 64 letters, digits, '_', '-' or '.', beginning with a letter, digit or '_', "
            f"without '..' and not ending in '.', found {quoted(name)}"
        )


def check_new_task_name(name: str, taken: Iterable[str]) -> None:
    """Refuse a name that cannot be one, or that is taken, also by one that differs in case alone.

    Raises:
        TaskNameError, DuplicateTaskError
    """
    check_free_task_name(name, {task_key(other): other for other in taken})


def check_free_task_name(name: str, taken: Mapping[str, str]) -> None:
    """As `check_new_task_name`, for a caller that keeps the names by their `task_key`, and so looks one up.

    Raises:
        TaskNameError, DuplicateTaskError
    """
    check_usable_task_name(name)
    if (other := taken.get(task_key(name))) is not None:
        raise duplicate_task(name, other)


def check_usable_task_name(name: str) -> None:
    """Refuse a name that cannot be a new task's.

    Raises:
        TaskNameError: as `check_task_name`; or a name that Windows keeps for a device, whatever the extension.
    """
    check_task_name(name)
    if _DEVICE_NAME.fullmatch(task_key(name)):
        raise TaskNameError(
            f"task name: expected one that a file can have on Windows too, found {name!r}, which names a device there; "
            "choose another name"
        )


def task_key(name: str) -> str:
    """What a task's name has in common with those that some file systems take for the same file."""
    return name.lower()


def duplicate_task(name: str, other: str) -> DuplicateTaskError:
    """The error for a task whose name is taken by another."""
    return DuplicateTaskError(f"task {name!r}: there is already {other!r}; remove it first or choose another name")


def unknown_task(name: object, known: Iterable[str]) -> UnknownTaskError:
    """The error for a task that is not there; it lists those that are, the first `_MOST_LISTED` of them."""
    names = sorted(known)
    listed = ", ".join(names[:_MOST_LISTED]) or "none"
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return UnknownTaskError(f"task {quoted(name)}: there is none of this name; tasks here: {listed}{more}")


def check_relative_path(path: str, where: str) -> None:
    """Refuse a path that leads out of the bundle.

    Raises:
        BundleError
    """
    if _OUTSIDE.search(path):
        raise BundleError(f"{where}: expected a relative path inside the bundle, found {quoted(path)}")


class _Fields:
    """A JSON object that is read field by field, each with its type and a message that names its place."""

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, dict):
            raise BundleError(f"{where}: expected a JSON object, found {type(content).__name__}")
        self._content, self.where = content, where

    def get(self, key: str, kind: type[T]) -> T:
        value = self._content.get(key)
        # JSON's true is Python's 1: a number must not be a truth value.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "nothing" if key not in self._content else f"{type(value).__name__} {str(value)[:60]!r}"
            raise BundleError(f"{self.where}: {key}: expected {kind.__name__}, found {found}")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        return None if self._content.get(key) is None else self.get(key, kind)

    def count(self, key: str, least: int = 0, most: int = 2**63 - 1) -> int:
        value = self.get(key, int)
        if not least <= value <= most:
            limit = f"{least} or more" if value < least else f"at most {most}"
            raise BundleError(f"{self.where}: {key}: expected a number of {limit}, found {value}")
        return value

    def child(self, key: str) -> _Fields:
        return _Fields(self.get(key, dict), f"{self.where}: {key}")

    def children(self, key: str) -> list[_Fields]:
        return [_Fields(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(self.get(key, list))]

    def named(self, key: str, read: Callable[[_Fields], T]) -> dict[str, T]:
        items = self.get(key, dict)
        return {name: read(_Fields(item, f"{self.where}: {key}.{name[:MOST_QUOTED]}")) for name, item in items.items()}

    def choice(self, key: str, *choices: str) -> str:
        value = self.get(key, str)
        if value not in choices:
            raise BundleError(
                f"{self.where}: {key}: expected {' or '.join(map(repr, choices))}, found {quoted(value)}; "
                "update prefix-runtime"
            )
        return value


def _read_manifest(fields: _Fields) -> Manifest:
    if fields.get("format", str) != FORMAT:
        raise BundleError(f"{fields.where}: expected format {FORMAT!r}, found {quoted(fields.get('format', str))}")
    version = fields.count("format_version", least=1)
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{fields.where}: expected format version {FORMAT_VERSION} or older, found {version}; update prefix-runtime"
        )
    listed = [_read_file(child) for child in fields.children("files")]
    files = {entry.path: entry for entry in listed}
    if len(files) != len(listed):
        raise BundleError(f"{fields.where}: files: expected each path once, found one twice")
    tasks = fields.named("tasks", _read_task)
    _check_tasks(tasks, fields.where)
    graph = fields.get("graph", str)
    if graph not in files:
        raise BundleError(f"{fields.where}: graph: expected one of the listed files, found {quoted(graph)}")
    cache = fields.choice("cache", *CACHE_TYPES)
    if CACHE_TYPES[cache] == np.int8 and SCALES_NAME not in files:
        raise BundleError(f"{fields.where}: files: expected {SCALES_NAME} among them for cache {cache!r}, found none")
    return Manifest(
        producer=fields.get("producer", str),
        model=_read_model(fields.child("model")),
        geometry=_read_geometry(fields.child("geometry")),
        max_length=fields.count("max_length", least=1),
        mode=fields.choice("mode", "feed", "bake"),
        flavour=fields.choice("flavour", "fast", "portable"),
        precision=fields.choice("precision", "fp32", "fp16", "bf16", "int8", "int4"),
        target=fields.choice("target", "cpu", "cuda", "portable", "web", "tensorrt"),
        graph=graph,
        weight_bytes=fields.count("weight_bytes", least=1),
        files=files,
        tasks=tasks,
        cache=cache,
        block_size=fields.count("block_size", 1, 1 << 16) if fields.optional("block_size", int) else None,
        quantizer=fields.choice("quantizer", "rtn", "hqq") if fields.optional("quantizer", str) else None,
        parity=_read_parity(fields),
        generation=_read_generation(fields),
    )


def _check_tasks(tasks: Mapping[str, TaskEntry], where: str) -> None:
    taken: dict[str, str] = {}
    for name, entry in tasks.items():
        check_task_name(name)
        if (other := taken.setdefault(task_key(name), name)) != name:
            raise duplicate_task(name, other)
        # Were it another file, removing the task would remove that.
        if entry.file.path != prefix_path(name):
            raise BundleError(
                f"{where}: tasks.{name}: file: path: expected {prefix_path(name)!r}, found {quoted(entry.file.path)}"
            )


def _read_parity(fields: _Fields) -> dict[str, Any] | None:
    parity = fields.optional("parity", dict)
    if parity is not None:
        results = _Fields(parity, f"{fields.where}: parity")
        results.named("tasks", _check_result)
    return parity


def _read_generation(fields: _Fields) -> dict[str, Any] | None:
    generation = fields.optional("generation", dict)
    if generation is not None:
        parts = _Fields(generation, f"{fields.where}: generation")
        parts.get("followed", list)
        parts.get("not_followed", dict)
    return generation


def _check_result(fields: _Fields) -> None:
    fields.get("reference", str)
    # Certificates of earlier versions name the difference from the reference itself.
    if fields.optional("largest_logit_difference", float) is None:
        fields.get("error", float)


def _read_file(fields: _Fields) -> FileEntry:
    path, sha256 = fields.get("path", str), fields.get("sha256", str)
    check_relative_path(path, f"{fields.where}: path")
    if not _SHA256.fullmatch(sha256):
        raise BundleError(f"{fields.where}: sha256: expected 64 hexadecimal digits, found {sha256[:70]!r}")
    return FileEntry(path, fields.count("size"), sha256)


def _read_task(fields: _Fields) -> TaskEntry:
    return TaskEntry(
        _read_file(fields.child("file")), fields.count("prefix_length", least=1), fields.count("position_base")
    )


def _read_model(fields: _Fields) -> ModelEntry:
    return ModelEntry(
        fields.get("name", str),
        fields.get("architecture", str),
        fields.get("fingerprint", str),
        fields.optional("revision", str),
    )


def _read_geometry(fields: _Fields) -> Geometry:
    layers = tuple(
        LayerGeometry(layer.count("key_value_heads", 1, _MOST_HEADS), layer.count("head_dim", 1, _MOST_HEAD_DIM))
        for layer in fields.children("layers")
    )
    if not layers:
        raise BundleError(f"{fields.where}: layers: expected at least one, found none")
    return Geometry(
        layers, fields.count("context_length", 1, _MOST_POSITIONS), fields.count("vocab_size", 1, _MOST_TOKENS)
    )
