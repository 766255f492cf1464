"""The place of a base model's files: a folder, a repository on the Hub, or a GGUF file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from prefix_export.errors import ModelError

from .hub import commit_of, split_revision

_GGUF = ".gguf"
_HUB_GGUF = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)", re.IGNORECASE)
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class ModelSource:
    """The place of a base model's files.

    Attributes:
        name: the user's name of the model.
        root: a folder or a Hub id; the folder of the file for a GGUF file.
        revision: the revision of a Hub id, or None.
        gguf: the GGUF file that holds everything, or None.
    """

    name: str
    root: str
    revision: str | None = None
    gguf: Path | None = None

    @classmethod
    def of(cls, name: str) -> ModelSource:
        """The place for a name.

        Raises:
            ModelError: the name is a file of another kind, a GGUF file that does not exist, or a folder with several.
        """
        path = Path(name)
        if path.is_dir():
            return cls._of_folder(name, path)
        if path.exists():
            return cls._of_file(name, path)
        root, revision = split_revision(name)
        if not root.lower().endswith(_GGUF):
            return cls(name, root, revision)
        match = _HUB_GGUF.fullmatch(root)
        folder = _cached(match[1], match[2], revision) if match else None
        if folder is None:
            raise ModelError(f"model {name!r}: expected a GGUF file, found no such file")
        return cls(name, str(folder.parent), revision, folder)

    @classmethod
    def _of_file(cls, name: str, path: Path) -> ModelSource:
        if path.is_file() and path.suffix.lower() == _GGUF:
            return cls(name, str(path.parent), gguf=path)
        raise ModelError(
            f"model {name!r}: expected a Hub id, a folder or a file that ends in {_GGUF}, found another file; name the "
            "folder with config.json and the weights"
        )

    @classmethod
    def _of_folder(cls, name: str, folder: Path) -> ModelSource:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() == _GGUF and path.is_file())
        if not files or any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
            return cls(name, name)
        if len(files) > 1:
            listed = ", ".join(path.name for path in files[:6]) + (", …" if len(files) > 6 else "")
            raise ModelError(
                f"model {name!r}: expected one GGUF file in the folder, found {len(files)} ({listed}); name one of them"
            )
        return cls(name, name, gguf=files[0])

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for transformers' loaders beside `root`."""
        return {"revision": self.revision} if self.revision else {}

    def file(self, name: str) -> Path | None:
        """A file of the folder or repository, downloaded if necessary; None if there is none."""
        return _cached(self.root, name, self.revision)

    @property
    def commit(self) -> str | None:
        """The commit of a repository if Hugging Face's cache knows it, otherwise the user's revision."""
        if Path(self.root).is_dir() and self.gguf is None:
            return None
        path = self.gguf if self.gguf is not None else self.file("config.json")
        return (commit_of(path) if path is not None else None) or self.revision


def _cached(root: str, name: str, revision: str | None) -> Path | None:
    try:
        path = cached_file(
            root,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # no such repository or revision: transformers' loader reports it
        return None
    return Path(path) if path is not None else None
