"""The bundle folder: opening, verifying, creating, and changing its tasks."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from prefix_runtime.checks import quoted
from prefix_runtime.errors import BundleError, BundleIntegrityError, PrefixError
from prefix_runtime.files import (
    FileIdentity,
    check_sha256,
    identity,
    locked,
    read_regular,
    sha256_of_file,
    write_file_atomically,
)
from prefix_runtime.prefix.cache_format import CacheFormat
from prefix_runtime.prefix.prefix import Prefix

from .external_files import external_files
from .manifest import FileEntry, Manifest, TaskEntry, prefix_path
from .task_names import check_new_task_name, unknown_task

MANIFEST_NAME = "manifest.json"
ADAPTER_SUFFIX = ".onnx_adapter"
# A manifest lists tasks by the thousand, not by the million; a larger file is not one.
_MAX_MANIFEST_BYTES = 64 << 20
# It was removed meanwhile, or is no regular file any more; other errors say themselves what is wrong.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL)


class Bundle:
    """A bundle folder on disk: its manifest, its tasks and their prefixes. `open` makes one.

    Attributes:
        root: the folder.
        manifest: the manifest, as it was when this object last read or changed it.

    Examples:
        >>> bundle = Bundle.open("bundle")  # doctest: +SKIP
        >>> bundle.tasks  # doctest: +SKIP
        ('headline', 'json')
        >>> bundle.add_task("again", bundle.prefix("json"))  # doctest: +SKIP
        >>> bundle.verify()  # doctest: +SKIP
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest
        self._verified: dict[str, FileIdentity] = {}
        self._verifies_prefixes = False

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle folder. This checks the manifest, and that every file is there with its size.

        Args:
            path: the folder.

        Returns:
            The bundle.

        Raises:
            BundleError: no bundle, or a manifest that is damaged, of a newer version, or that leads outside the folder.
            BundleIntegrityError: a file is missing or has another size; copy the bundle again.
        """
        root = Path(path)
        bundle = cls(root, read_manifest(root))
        check_sizes(root, bundle.entries())
        return bundle

    def entries(self) -> list[FileEntry]:
        """Every file that the manifest names."""
        return [*self.manifest.files.values(), *(task.file for task in self.manifest.tasks.values())]

    def verify(self) -> None:
        """Compare every file with its SHA-256. From then on, compare each prefix again when it is read.

        Other files may be read later by other code. Call `check_unchanged` after that.

        Raises:
            BundleIntegrityError: the first file that differs, or weights that the manifest does not list.
        """
        self._verify(self.entries())
        self._external_files()
        self._verifies_prefixes = True

    def verify_graph(self) -> None:
        """Compare the graph and its weights with their SHA-256, and nothing else; see `verify`.

        Raises:
            BundleIntegrityError: as in `verify`.
        """
        graph_files = self.manifest.graph_files
        self._verify(graph_files)
        self._verify([entry for entry in self._external_files() if entry not in graph_files])

    def _verify(self, entries: Sequence[FileEntry]) -> None:
        check_sizes(self.root, entries)
        for entry in entries:
            path = self.root / entry.path
            with _missing_named(path, entry.size):
                if entry.path in self.manifest.files:
                    self._verified[entry.path] = identity(path)
                check_sha256(path, sha256_of_file(path), entry.sha256)

    def _external_files(self) -> list[FileEntry]:
        """The files of weights that the graph names; each must be listed, or nothing would tell which it should be."""
        graph, listed = self.graph_path, self.manifest.files
        with _missing_named(graph, listed[self.manifest.graph].size):
            content = read_regular(graph)
        try:
            named = sorted(external_files(content))
        except ValueError as error:
            raise BundleIntegrityError(f"{graph}: expected an ONNX graph, found {error}") from error
        folder = self.manifest.graph.rpartition("/")[0]
        entries = []
        for name in named:
            path = posixpath.normpath(posixpath.join(folder, name))
            if path not in listed:
                raise BundleIntegrityError(
                    f"{graph}: expected weights in files that the manifest lists, found {quoted(name)}, which it does "
                    "not; build or copy the bundle again"
                )
            entries.append(listed[path])
        return entries

    def check_unchanged(self) -> None:
        """Refuse files that were replaced or written to since `verify` read them.

        Raises:
            BundleIntegrityError: the first such file.
        """
        for name, before in self._verified.items():
            path = self.root / name
            with _missing_named(path, before.size):
                is_same = identity(path) == before
            if not is_same:
                raise BundleIntegrityError(
                    f"{path}: expected the file that was verified, found that it was changed meanwhile; open the "
                    "bundle again when nothing writes to it"
                )

    @property
    def graph_path(self) -> Path:
        """Path of the ONNX graph."""
        return self.root / self.manifest.graph

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, sorted."""
        return tuple(sorted(self.manifest.tasks))

    def prefix(self, task: str) -> Prefix:
        """A task's prefix, read from its file and compared with the manifest.

        Args:
            task: the task.

        Returns:
            The prefix, in memory: later changes of the file do not reach it.

        Raises:
            UnknownTaskError: there is no such task; the message lists the tasks.
            PrefixError: the file is damaged, or holds another prefix than the manifest says.
            BundleIntegrityError: the bundle was verified, and the file was changed since.
        """
        entry = self.manifest.tasks.get(task)
        if entry is None:
            raise unknown_task(task, self.manifest.tasks)
        path = self.root / entry.file.path
        prefix = Prefix.load(path, entry.file.sha256 if self._verifies_prefixes else None)
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
            PrefixMismatchError: it was made for another model, has other shapes, leaves no room for text, or goes
                beyond what an 8-bit cache holds.
        """
        manifest = self.manifest
        manifest.geometry.check_prefix(prefix, where, manifest.model.fingerprint, manifest.max_length)
        self.cache_format.check(prefix, where)

    @cached_property
    def cache_format(self) -> CacheFormat:
        """What the keys and values of the graph's past and present are kept in.

        Raises:
            BundleError: the file of scales is damaged or does not fit the model.
        """
        return CacheFormat.of_bundle(self.root, self.manifest.cache, self.manifest.geometry)

    def check_length(self, prefixes: Sequence[Prefix], where: str) -> None:
        """Refuse prefixes that together leave no room for text; `where` names them in the message.

        Raises:
            PrefixMismatchError: shorter prefixes, or fewer, leave room.
        """
        manifest, length = self.manifest, sum(prefix.prefix_length for prefix in prefixes)
        position_base = length if prefixes[0].position_base else 0
        manifest.geometry.check_length(length, position_base, where, manifest.max_length)

    def check_tasks_may_change(self) -> None:
        """Refuse to add or remove tasks where the graph holds their prefixes.

        Raises:
            BundleError: the graph holds the prefixes; build the bundle again.
        """
        if self.manifest.mode == "bake":
            raise BundleError(
                f"{self.root}: expected a bundle that feeds prefixes to its graph, found one whose graph holds them; "
                "build it anew with its tasks"
            )

    def check_folder_may_change(self) -> None:
        """Refuse to add or remove tasks in a folder whose graph or adapter files belong to its tasks.

        Raises:
            BundleError: the graph or adapter files hold the tasks; build the bundle again with its tasks.
        """
        self.check_tasks_may_change()
        if any(name.endswith(ADAPTER_SUFFIX) for name in self.manifest.files):
            raise BundleError(
                f"{self.root}: expected a bundle without adapter files, which belong to its tasks, found some; "
                "build it anew with its tasks"
            )

    def add_task(self, name: str, prefix: Prefix) -> None:
        """Add a task to the folder: its file first, then the manifest, replaced in one step.

        An engine that has the bundle open does not see the task; see `Engine.add_task`. If an error is raised, the
        bundle is as it was.

        Args:
            name: 1 to 64 letters, digits, `_`, `-` or `.`.
            prefix: the prefix; `Prefix.load` reads one from a file.

        Raises:
            TaskNameError: the name cannot name a task.
            DuplicateTaskError: the name is taken; remove that task first.
            PrefixError: not a prefix.
            PrefixMismatchError: the prefix does not fit the model.
            BundleError: the graph holds its prefixes, or adapter files belong to its tasks; build the bundle again.
            OSError: the disk is full or not writable.
        """
        if not isinstance(prefix, Prefix):
            raise PrefixError(f"task {name!r}: expected a Prefix, found {prefix!r}; read a file with Prefix.load")
        self.check_folder_may_change()
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

        Args:
            name: the task.

        Raises:
            UnknownTaskError: there is no such task.
            BundleError: the graph holds its prefixes, or adapter files belong to its tasks; build the bundle again.
            OSError: the disk is not writable; the bundle is as it was.
        """
        self.check_folder_may_change()
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
        text = read_regular(path, _MAX_MANIFEST_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(
            f"{root}: expected a bundle (a folder with {MANIFEST_NAME}), found none; make one with: prefix-export build"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise BundleError(f"{path}: expected a manifest of at most {_MAX_MANIFEST_BYTES} bytes") from error
        raise BundleError(f"{path}: cannot be read: {error}") from error
    return Manifest.from_json(text, str(path))


def check_sizes(root: Path, entries: Iterable[FileEntry]) -> None:
    """Refuse a bundle folder whose files are not all there, regular, inside of it and of their sizes.

    Raises:
        BundleError: a link that leads outside.
        BundleIntegrityError: a file is missing or of another size.
    """
    inside: dict[str, bool] = {}  # by folder: each is looked at once
    for entry in entries:
        folder = entry.path.rpartition("/")[0]
        path = f"{root}/{entry.path}"
        try:
            if folder not in inside:
                inside[folder] = _is_inside(root, root / folder)
            status = os.lstat(path)
            is_link = stat.S_ISLNK(status.st_mode)
            if not inside[folder] or (is_link and not _is_inside(root, Path(path))):
                raise BundleError(f"{path}: expected a file inside the bundle, found a link to {Path(path).resolve()}")
            status = Path(path).stat() if is_link else status
        except FileNotFoundError:
            status = None
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, no name at all
            raise BundleIntegrityError(f"{path}: expected a file of {entry.size} bytes, found {error}") from error
        if status is None or not stat.S_ISREG(status.st_mode):
            raise BundleIntegrityError(
                f"{path}: expected a file of {entry.size} bytes, found none; copy the bundle again"
            )
        if status.st_size != entry.size:
            raise BundleIntegrityError(
                f"{path}: expected {entry.size} bytes, found {status.st_size}; the copy is incomplete or the file was "
                "changed"
            )


def _is_inside(root: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


@contextmanager
def _missing_named(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise BundleIntegrityError(f"{path}: expected a file of {size} bytes, found {error}") from error


def write_prefix(root: Path, name: str, prefix: Prefix) -> TaskEntry:
    """Write a task's prefix into a bundle folder and return the manifest's entry for it."""
    relative = prefix_path(name)
    path = root / relative
    path.parent.mkdir(exist_ok=True)
    prefix.save(path)
    return TaskEntry(
        describe_file(root, relative), prefix.prefix_length, prefix.position_base, tuple(sorted(prefix.sites))
    )


def adapter_path(task: str) -> str:
    """Where a bundle keeps a task's adapter file, if it has such."""
    return f"adapters/{task}{ADAPTER_SUFFIX}"


def describe_file(root: Path, relative: str, on_bytes: Callable[[int], object] = lambda count: None) -> FileEntry:
    """A file's size and SHA-256, as the manifest lists them; the listener is told how many bytes more were read."""
    path = root / relative
    return FileEntry(relative, path.stat().st_size, sha256_of_file(path, on_bytes))
