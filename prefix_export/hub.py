"""Names of models and adapters: a path, a Hub id, or a Hub id with a revision."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_PATH = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)*")


def split_revision(name: str) -> tuple[str, str | None]:
    """The Hub id and the revision of `ID@REVISION`; the name itself and None for anything else.

    A file or folder that exists is a path, even if its name contains `@`.
    """
    found, at, revision = name.partition("@")
    if not at or not revision or Path(name).exists() or not _HUB_PATH.fullmatch(found):
        return name, None
    return found, revision
