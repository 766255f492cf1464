"""The bundle's manifest: what it says, how it is written, and what is refused when it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from prefix_runtime.checks import quoted
from prefix_runtime.errors import BundleError
from prefix_runtime.json_reader import Fields
from prefix_runtime.prefix.cache_format import CACHE_TYPES, SCALES_NAME
from prefix_runtime.prefix.geometry import Geometry, LayerGeometry
from prefix_runtime.prefix.prefix import CROSS, DECODER, ENCODER, SITES

from .task_names import check_new_task_name, check_task_name, duplicate_task, task_key, unknown_task

FORMAT = "prefix-export.bundle"
FORMAT_VERSION = 2
_SITES_SINCE = 2
"""The first format version whose geometry lists layers by site; earlier ones list a decoder-only model's."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What no model comes near: buffers are made by these numbers, and a manifest may come from anywhere.
_MOST_HEADS, _MOST_HEAD_DIM, _MOST_POSITIONS, _MOST_TOKENS = 1 << 12, 1 << 13, 1 << 26, 1 << 24
# What no path inside the bundle has: a drive, a backslash, a part that is empty, `.` or `..`.
_OUTSIDE = re.compile(r"[\\:\0]|(?:^|/)\.{0,2}(?:/|\Z)")


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: path relative to the bundle with `/`, size in bytes, SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class TaskEntry:
    """A task.

    Attributes:
        file: its prefix's file.
        prefix_length: positions that the prefix takes at each of its sites.
        position_base: the position of the first token of text.
        sites: the attention sites that the prefix has keys and values for, sorted.
    """

    file: FileEntry
    prefix_length: int
    position_base: int
    sites: tuple[str, ...] = (DECODER,)


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
        graph: the graph's path; the decoder's, for an encoder-decoder.
        weight_bytes: of the weights that one decode step reads.
        files: every file but the prefixes and the manifest itself, by path.
        tasks: by name.
        cache: what keys and values are kept in: "fp32", "fp16", "bf16" or "int8".
        block_size: weights that share a scale, at most; None for "fp32", and where each output has one.
        quantizer: how weights were rounded, "rtn" or "hqq"; None for "fp32".
        parity: the certificate that `build` wrote, or None where it was told not to verify.
        generation: "followed": names of the model's generation defaults that the runtime follows; "not_followed": those
            that it does not, with their values. None in bundles of older versions.
        encoder_graph: the path of an encoder-decoder's encoder; None for a decoder-only model.
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
    encoder_graph: str | None = None

    @property
    def graph_files(self) -> list[FileEntry]:
        """The graph, or the decoder's and the encoder's, and their weights."""
        graphs = [self.graph, *filter(None, [self.encoder_graph])]
        names = [name for graph in graphs for name in (graph, f"{graph}.data")]
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
        return _read_manifest(Fields(content, where, BundleError))


def prefix_path(task: str) -> str:
    """Where a task's prefix lies in the bundle."""
    return f"prefixes/{task}.safetensors"


def check_relative_path(path: str, where: str) -> None:
    """Refuse a path that leads out of the bundle.

    Raises:
        BundleError: the path is absolute, empty, or leads out with `..`, a drive or a backslash.
    """
    if _OUTSIDE.search(path):
        raise BundleError(f"{where}: expected a relative path inside the bundle, found {quoted(path)}")


def _read_manifest(fields: Fields) -> Manifest:
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
    geometry = _read_geometry(fields.child("geometry"), version)
    tasks = fields.named("tasks", partial(_read_task, sites=tuple(geometry.sites)))
    _check_tasks(tasks, fields.where)
    encoder_graph = _read_graph(fields, "encoder_graph", files) if geometry.is_encoder_decoder else None
    cache = fields.choice("cache", *CACHE_TYPES)
    if CACHE_TYPES[cache] == np.int8 and SCALES_NAME not in files:
        raise BundleError(f"{fields.where}: files: expected {SCALES_NAME} among them for cache {cache!r}, found none")
    return Manifest(
        producer=fields.get("producer", str),
        model=_read_model(fields.child("model")),
        geometry=geometry,
        max_length=fields.count("max_length", least=1),
        mode=fields.choice("mode", "feed", "bake"),
        flavour=fields.choice("flavour", "fast", "portable"),
        precision=fields.choice("precision", "fp32", "fp16", "bf16", "int8", "int4"),
        target=fields.choice("target", "cpu", "cuda", "portable", "web", "tensorrt"),
        graph=_read_graph(fields, "graph", files),
        weight_bytes=fields.count("weight_bytes", least=1),
        files=files,
        tasks=tasks,
        cache=cache,
        block_size=fields.count("block_size", 1, 1 << 16) if fields.optional("block_size", int) else None,
        quantizer=fields.choice("quantizer", "rtn", "hqq") if fields.optional("quantizer", str) else None,
        parity=_read_parity(fields),
        generation=_read_generation(fields),
        encoder_graph=encoder_graph,
    )


def _read_graph(fields: Fields, key: str, files: Mapping[str, FileEntry]) -> str:
    graph = fields.get(key, str)
    if graph not in files:
        raise BundleError(f"{fields.where}: {key}: expected one of the listed files, found {quoted(graph)}")
    return graph


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


def _read_parity(fields: Fields) -> dict[str, Any] | None:
    parity = fields.optional("parity", dict)
    if parity is not None:
        results = Fields(parity, f"{fields.where}: parity", BundleError)
        results.named("tasks", _check_result)
    return parity


def _read_generation(fields: Fields) -> dict[str, Any] | None:
    generation = fields.optional("generation", dict)
    if generation is not None:
        parts = Fields(generation, f"{fields.where}: generation", BundleError)
        parts.get("followed", list)
        parts.get("not_followed", dict)
    return generation


def _check_result(fields: Fields) -> None:
    fields.get("reference", str)
    # Certificates of earlier versions name the difference from the reference itself.
    if fields.optional("largest_logit_difference", float) is None:
        fields.get("error", float)


def _read_file(fields: Fields) -> FileEntry:
    path, sha256 = fields.get("path", str), fields.get("sha256", str)
    check_relative_path(path, f"{fields.where}: path")
    if not _SHA256.fullmatch(sha256):
        raise BundleError(f"{fields.where}: sha256: expected 64 hexadecimal digits, found {sha256[:70]!r}")
    return FileEntry(path, fields.count("size"), sha256)


def _read_task(fields: Fields, sites: tuple[str, ...]) -> TaskEntry:
    file = _read_file(fields.child("file"))
    listed = fields.optional("sites", list) or [DECODER]
    if not all(site in sites for site in listed):
        raise BundleError(f"{fields.where}: sites: expected some of {', '.join(sites)}, found {str(listed)[:60]}")
    return TaskEntry(file, fields.count("prefix_length", least=1), fields.count("position_base"), tuple(sorted(listed)))


def _read_model(fields: Fields) -> ModelEntry:
    return ModelEntry(
        fields.get("name", str),
        fields.get("architecture", str),
        fields.get("fingerprint", str),
        fields.optional("revision", str),
    )


def _read_geometry(fields: Fields, version: int) -> Geometry:
    if version < _SITES_SINCE:
        sites = {DECODER: _read_layers(fields, "layers")}
    else:
        listed = fields.child("sites")
        names = SITES if listed.has(CROSS) or listed.has(ENCODER) else SITES[:1]
        sites = {site: _read_layers(listed, site) for site in names}
    return Geometry(
        sites,
        fields.count("context_length", 1, _MOST_POSITIONS),
        fields.count("vocab_size", 1, _MOST_TOKENS),
        fields.count("source_length", 1, _MOST_POSITIONS) if CROSS in sites else None,
    )


def _read_layers(fields: Fields, key: str) -> tuple[LayerGeometry, ...]:
    layers = tuple(
        LayerGeometry(layer.count("key_value_heads", 1, _MOST_HEADS), layer.count("head_dim", 1, _MOST_HEAD_DIM))
        for layer in fields.children(key)
    )
    if not layers:
        raise BundleError(f"{fields.where}: {key}: expected at least one, found none")
    return layers
