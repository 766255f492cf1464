"""Serialized TensorRT engines in a folder, `engines.json` beside them, and whether they still fit their bundle.

The folder is the bundle's `tensorrt`, or any other: a bundle's manifest knows nothing of it, so that engines come and
go and older runtimes open the bundle as ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefix_runtime.bundle.folder import Bundle, describe_file
from prefix_runtime.bundle.manifest import FileEntry, Manifest, check_relative_path
from prefix_runtime.checks import quoted
from prefix_runtime.errors import BundleError, BundleIntegrityError
from prefix_runtime.files import locked, read_regular, sha256_of_file, write_file_atomically
from prefix_runtime.json_reader import DataclassReader, Fields

from .profile import Profile, Tensor

FOLDER = "tensorrt"
"""Of a bundle's engines."""

RECORD_NAME = "engines.json"
FORMAT = "prefix-export.engines"
FORMAT_VERSION = 1
_MAX_RECORD_BYTES = 64 << 20
BACKENDS = ("tensorrt-rtx", "tensorrt")


@dataclass(frozen=True)
class TensorRTEngineRecord:
    """What an engine is and what it was made of.

    Attributes:
        name: the backend and the compute capabilities; one engine of a name is kept.
        file: the serialized engine, relative to the folder.
        backend: "tensorrt-rtx" or "tensorrt".
        version: of the library.
        compute_capabilities: that it runs on, as "8.6"; none where TensorRT for RTX chose: 8.0 and above.
        graph: what `graph_hash` says of the bundle's graph.
        options: that change what is built.
        profiles: ranges of sizes, of a prompt and of a decode step.
        inputs, outputs: their types and shapes.
        refittable: for a bundle whose graph holds prefixes, by the prefix' array (`0.key`) the name of the weight that
            another one may take the place of; empty where none may.
        read_back: what profiles, inputs and outputs were read from: "engine", or "network", which it was built of,
            where there was no GPU to open the engine on.
    """

    name: str
    file: FileEntry
    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    graph: str
    options: Mapping[str, Any]
    profiles: tuple[Profile, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    refittable: Mapping[str, str]
    read_back: str


def graph_hash(manifest: Manifest) -> str:
    """A hash of a bundle's graph with its weights, from the hashes that the manifest lists."""
    lines = (f"{entry.path}\n{entry.sha256}\n" for entry in manifest.graph_files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def recipe_hash(graph: str, backend: str, version: str, options: Mapping[str, Any], profiles: Sequence[Profile]) -> str:
    """A hash of all that an engine depends on."""
    recipe = [graph, backend, version, options, [asdict(profile) for profile in profiles]]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def tensorrt_engines_folder(bundle: Bundle) -> Path:
    """Where a bundle's own engines lie."""
    return bundle.root / FOLDER


def read_tensorrt_engines(folder: Path) -> list[TensorRTEngineRecord]:
    """The engines of a folder; none where there is no record.

    Raises:
        BundleError: the record is damaged, or of a newer version.
    """
    path = folder / RECORD_NAME
    try:
        text = read_regular(path, _MAX_RECORD_BYTES).decode()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read: {error}") from error
    try:
        records = _read_records(Fields(json.loads(text), RECORD_NAME, ValueError), path)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path}: expected a record of engines, found one that is damaged ({error}); remove it "
            "and the engines beside it, and build them anew with: prefix-export tensorrt"
        ) from error
    for record in records:
        check_relative_path(record.file.path, f"{path}: engine {record.name!r}: file")
    return records


def _read_records(fields: Fields, path: Path) -> list[TensorRTEngineRecord]:
    kind, version = fields.get("format", str), fields.count("format_version", 1)
    if kind != FORMAT:
        raise BundleError(f"{path}: expected format {FORMAT!r}, found {quoted(kind)}")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: expected format version {FORMAT_VERSION} or older, found {version}; update prefix-runtime"
        )
    reader, engines = DataclassReader(ValueError), enumerate(fields.get("engines", list))
    return [reader.read(TensorRTEngineRecord, engine, f"engines[{index}]") for index, engine in engines]


def add_tensorrt_engine(folder: Path, record: TensorRTEngineRecord, content: bytes) -> TensorRTEngineRecord:
    """Write an engine and its record, in the place of one of the same name; returns the record with its file.

    The file first, under a name that no other engine has, then the record, replaced in one step, then the old file is
    removed: a reader finds the old engine or the new one.

    Raises:
        BundleError: the record that is there is damaged.
        OSError: the disk is full or not writable; the folder is as it was.
    """
    with locked(folder):
        before = read_tensorrt_engines(folder)
        relative = f"{record.name}-{hashlib.sha256(content).hexdigest()[:12]}.engine"
        known = {each.file.path for each in before}
        try:
            write_file_atomically(folder / relative, content)
            record = TensorRTEngineRecord(**(vars(record) | {"file": describe_file(folder, relative)}))
            kept = [each for each in before if each.name != record.name]
            _write(folder, [*kept, record])
        except BaseException:
            if relative not in known | {each.file.path for each in read_tensorrt_engines(folder)}:
                (folder / relative).unlink(missing_ok=True)
            raise
        for each in before:
            if each.name == record.name and each.file.path != relative:
                (folder / each.file.path).unlink(missing_ok=True)
    return record


def check_tensorrt_engine(folder: Path, record: TensorRTEngineRecord, bundle: Bundle) -> None:
    """Refuse an engine that was not built of this bundle's graph, or is not whole.

    Raises:
        BundleError: it was built of another graph.
        BundleIntegrityError: its file is missing or changed.
    """
    path = _engine_path(folder, record, bundle)
    _check_content(path, sha256_of_file(path), record, bundle)


def read_tensorrt_engine(folder: Path, record: TensorRTEngineRecord, bundle: Bundle) -> bytes:
    """A serialized engine that was built of this bundle's graph and is whole; its file is read once.

    Raises:
        BundleError, BundleIntegrityError: as `check_tensorrt_engine`.
    """
    path = _engine_path(folder, record, bundle)
    content = read_regular(path)
    _check_content(path, hashlib.sha256(content).hexdigest(), record, bundle)
    return content


def _engine_path(folder: Path, record: TensorRTEngineRecord, bundle: Bundle) -> Path:
    if record.graph != graph_hash(bundle.manifest):
        raise BundleError(
            f"{folder}: engine {record.name!r}: expected one of this bundle's graph, found one that was built of "
            f"another; build it anew with: prefix-export tensorrt {bundle.root}"
        )
    path = folder / record.file.path
    if not path.is_file():
        raise BundleIntegrityError(
            f"{path}: expected an engine of {record.file.size} bytes, found none; build it anew with: prefix-export "
            f"tensorrt {bundle.root}"
        )
    return path


def _check_content(path: Path, actual: str, record: TensorRTEngineRecord, bundle: Bundle) -> None:
    if actual != record.file.sha256:
        raise BundleIntegrityError(
            f"{path}: expected SHA-256 {record.file.sha256}, found {actual}; the engine was changed or damaged: build "
            f"it anew with: prefix-export tensorrt {bundle.root}"
        )


def _write(folder: Path, records: Sequence[TensorRTEngineRecord]) -> None:
    listed = sorted(records, key=lambda record: record.name)
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "engines": [asdict(record) for record in listed]}
    write_file_atomically(folder / RECORD_NAME, (json.dumps(content, indent=1) + "\n").encode())
