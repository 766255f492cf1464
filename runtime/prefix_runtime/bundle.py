"""The bundle folder: opening, verifying, creating, and changing its tasks."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .cache_format import CacheFormat
from .errors import BundleError, BundleIntegrityError, PrefixError
from .manifest import FileEntry, Manifest, TaskEntry, check_new_task_name, prefix_path, unknown_task
from .prefix import Prefix
from .storage import (
    locked,
    partial_name,
    sha256_of_file,
    sync_folder,
    sync_tree,
    write_file_atomically,
)

MANIFEST_NAME = "manifest.json"
ADAPTER_SUFFIX = ".onnx_adapter"
# A manifest lists tasks by the thousand, not by the million; a larger file is not one.
_MAX_MANIFEST_BYTES = 64 << 20


class Bundle:
    """A bundle folder on disk.

    Attributes:
        root: the folder.
        manifest: what it holds, as it was when it was last read or changed through this object.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """The bundle in a folder; its manifest is checked, and that every file is there with the size it should have.

        Raises:
            BundleError: no bundle, a manifest that is damaged, of a newer version, or that leads outside the folder.
            BundleIntegrityError: a file is missing or of another size.
        """
        root = Path(path)
        bundle = cls(root, read_manifest(root))
        for entry in bundle.entries():
            bundle._check_size(entry)
        return bundle

    def entries(self) -> list[FileEntry]:
        """Every file that the manifest names."""
        return [*self.manifest.files.values(), *(task.file for task in self.manifest.tasks.values())]

    def verify(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            BundleIntegrityError: naming the first file that differs.
        """
        self._verify(self.entries())

    def verify_graph(self) -> None:
        """Compare the graph and its weights with their SHA-256.

        Raises:
            BundleIntegrityError: as `verify`.
        """
        self._verify(self.manifest.graph_files)

    def _verify(self, entries: Iterable[FileEntry]) -> None:
        for entry in entries:
            self._check_size(entry)
            found = sha256_of_file(self.root / entry.path)
            if found != entry.sha256:
                raise BundleIntegrityError(
                    f"{self.root / entry.path}: expected SHA-256 {entry.sha256}, found {found}; "
                    "the file was changed or damaged: build or copy the bundle again"
                )

    def _check_size(self, entry: FileEntry) -> None:
        path = self.root / entry.path
        try:
            resolved, is_file = path.resolve(), path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, no name at all
            raise BundleIntegrityError(f"{path}: expected a file of {entry.size} bytes, found {error}") from error
        if not resolved.is_relative_to(self.root.resolve()):
            raise BundleError(f"{path}: expected a file inside the bundle, found a link to {resolved}")
        if not is_file:
            raise BundleIntegrityError(
                f"{path}: expected a file of {entry.size} bytes, found none; copy the bundle again"
            )
        size = path.stat().st_size
        if size != entry.size:
            raise BundleIntegrityError(
                f"{path}: expected {entry.size} bytes, found {size}; the copy is incomplete or the file was changed"
            )

    @property
    def graph_path(self) -> Path:
        """The ONNX graph."""
        return self.root / self.manifest.graph

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, sorted."""
        return tuple(sorted(self.manifest.tasks))

    def prefix(self, task: str) -> Prefix:
        """A task's prefix, read from its file and compared with the manifest.

        Raises:
            UnknownTaskError: there is no such task; the message lists those that there are.
            PrefixError: its file is damaged or holds another prefix than the manifest says.
        """
        entry = self.manifest.tasks.get(task)
        if entry is None:
            raise unknown_task(task, self.manifest.tasks)
        path = self.root / entry.file.path
        prefix = Prefix.load(path)
        self.check_prefix(prefix, str(path))
        if (prefix.prefix_length, prefix.position_base) != (entry.prefix_length, entry.position_base):
            raise PrefixError(
                f"{path}: expected prefix length {entry.prefix_length} and position base {entry.position_base} as the "
                f"manifest says, found {prefix.prefix_length} and {prefix.position_base}"
            )
        return prefix

    def check_prefix(self, prefix: Prefix, where: str) -> None:
        """Refuse a prefix that does not fit the bundle's model; `where` names it in the message.

        Raises:
            PrefixMismatchError
        """
        manifest = self.manifest
        manifest.geometry.check_prefix(prefix, where, manifest.model.fingerprint, manifest.max_length)
        CacheFormat.of_bundle(self.root, manifest.cache, manifest.geometry).check(prefix, where)

    def check_length(self, prefixes: Sequence[Prefix], where: str) -> None:
        """Refuse prefixes that together leave no room for text; `where` names them in the message.

        Raises:
            PrefixMismatchError
        """
        manifest, length = self.manifest, sum(prefix.prefix_length for prefix in prefixes)
        position_base = length if prefixes[0].position_base else 0
        manifest.geometry.check_length(length, position_base, where, manifest.max_length)

    def check_tasks_may_change(self) -> None:
        """Refuse to add or remove tasks where the graph holds their prefixes.

        Raises:
            BundleError
        """
        if self.manifest.mode == "bake":
            raise BundleError(
                f"{self.root}: expected a bundle that feeds prefixes to its graph, found one whose graph holds them; "
                "build it anew with its tasks"
            )

    def _check_folder_may_change(self) -> None:
        self.check_tasks_may_change()
        if any(name.endswith(ADAPTER_SUFFIX) for name in self.manifest.files):
            raise BundleError(
                f"{self.root}: expected a bundle without adapter files, which belong to its tasks, found some; "
                "build it anew with its tasks"
            )

    def add_task(self, name: str, prefix: Prefix) -> None:
        """Add a task to the folder: its file first, then the manifest, replaced in one step.

        An engine that has the bundle open does not see it; see `Engine.add_task`.

        Raises:
            TaskNameError, DuplicateTaskError, PrefixError, PrefixMismatchError: nothing was changed.
            BundleError: the graph holds its prefixes, or adapter files belong to its tasks.
            OSError: the disk is full or not writable; the bundle is as it was.
        """
        if not isinstance(prefix, Prefix):
            raise PrefixError(f"task {name!r}: expected a Prefix, found {prefix!r}; read a file with Prefix.load")
        self._check_folder_may_change()
        self.check_prefix(prefix, f"task {name!r}")
        with locked(self.root):
            self.manifest = read_manifest(self.root)
            check_new_task_name(name, self.manifest.tasks)
            try:
                entry = write_prefix(self.root, name, prefix)
                self._replace_manifest(self.manifest.with_task(name, entry))
            except BaseException:
                # It may have been interrupted after the manifest was replaced: then the file belongs to it.
                if name not in read_manifest(self.root).tasks:
                    (self.root / prefix_path(name)).unlink(missing_ok=True)
                raise

    def remove_task(self, name: str) -> None:
        """Remove a task: from the manifest, replaced in one step, then its file.

        Raises:
            UnknownTaskError: there is no such task.
            BundleError: the graph holds its prefixes, or adapter files belong to its tasks.
            OSError: the disk is not writable; the bundle is as it was.
        """
        self._check_folder_may_change()
        with locked(self.root):
            self.manifest = read_manifest(self.root)
            changed = self.manifest.without_task(name)
            path = self.root / self.manifest.tasks[name].file.path
            self._replace_manifest(changed)
            path.unlink(missing_ok=True)

    def _replace_manifest(self, manifest: Manifest) -> None:
        write_file_atomically(self.root / MANIFEST_NAME, manifest.to_json().encode())
        self.manifest = manifest


def read_manifest(root: Path) -> Manifest:
    """The manifest of a bundle folder.

    Raises:
        BundleError: no bundle, or a manifest that is damaged, of a newer version, or that leads outside the folder.
    """
    path = root / MANIFEST_NAME
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: expected a manifest of at most {_MAX_MANIFEST_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(
            f"{root}: expected a bundle (a folder with {MANIFEST_NAME}), found none; make one with: prefix-export build"
        ) from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read: {error}") from error
    return Manifest.from_json(text, str(path))


def write_prefix(root: Path, name: str, prefix: Prefix) -> TaskEntry:
    """Write a task's prefix into a bundle folder and return the manifest's entry for it."""
    relative = prefix_path(name)
    path = root / relative
    path.parent.mkdir(exist_ok=True)
    prefix.save(path)
    return TaskEntry(describe_file(root, relative), prefix.prefix_length, prefix.position_base)


def adapter_path(task: str) -> str:
    """Where a bundle keeps a task's adapter file, if it has such."""
    return f"adapters/{task}{ADAPTER_SUFFIX}"


def describe_file(root: Path, relative: str) -> FileEntry:
    """A file's size and SHA-256, as the manifest lists them."""
    path = root / relative
    return FileEntry(relative, path.stat().st_size, sha256_of_file(path))


def check_output(output: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        BundleError: the output exists, or the folder that it is to stand in does not.
    """
    if output.exists() or output.is_symlink():
        raise BundleError(f"{output}: expected nothing there yet; remove it or choose another --output")
    if not output.absolute().parent.is_dir():
        raise BundleError(f"{output.absolute().parent}: expected a folder to write into, found none")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A fresh sibling folder that becomes `output` when the block ends well, and is removed when it does not.

    Raises:
        BundleError: the output exists, or the folder that it is to stand in does not.
    """
    check_output(output)
    staging = partial_name(output.absolute())
    staging.mkdir()
    try:
        yield staging
        sync_tree(staging)
        check_output(output)
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(output.absolute().parent)
