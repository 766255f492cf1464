"""Parse names of models and adapters: a path, a Hub id, or a Hub id with a revision."""

from __future__ import annotations

import re
from pathlib import Path

from prefix_export.errors import ModelError

_HUB_PATH = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)*")


def split_revision(name: str) -> tuple[str, str | None]:
    """The Hub id and the revision of `ID@REVISION`; the name itself and None for anything else.

    A file or folder that exists is a path, even if its name contains `@`.
    """
    model, at, revision = name.partition("@")
    if not at or not revision or Path(name).exists() or not _HUB_PATH.fullmatch(model):
        return name, None
    return model, revision


def with_revision(model: str | None, revision: str | None) -> str | None:
    """The name `ID@REVISION` of a Hub id and a separate revision; the name itself without a revision.

    Raises:
        ModelError: the revision has no Hub id, or the Hub id already has a revision.
    """
    if revision is None:
        return model
    if model is None:
        raise ModelError(f"--revision {revision}: expected --model with a Hub id, found none")
    name, own = split_revision(model)
    if own is not None or Path(model).exists():
        actual = f"one with the revision {own!r} already" if own is not None else "a path, which has no revisions"
        raise ModelError(f"--revision {revision}: expected a Hub id as --model, found {actual}")
    return f"{name}@{revision}"


def shown_name(name: str) -> str:
    """The name of a model for people: a folder's last part, a GGUF file's stem, a Hub id without its revision."""
    path = Path(name)
    if path.is_dir():
        return path.resolve().name
    model, _ = split_revision(name)
    return Path(model).stem if model.lower().endswith(".gguf") else model


def commit_of(cached: str | Path) -> str | None:
    """The commit of a file in Hugging Face's cache, or None for a path elsewhere.

    Source: huggingface_hub 1, `snapshots/COMMIT/FILE` of the cache's layout.
    """
    parts = Path(cached).parts
    if "snapshots" not in parts[:-2]:
        return None
    commit = parts[parts.index("snapshots") + 1]
    return commit if parts[parts.index("snapshots") - 1].startswith("models--") else None
