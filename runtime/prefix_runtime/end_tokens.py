"""The tokens that end a text, as a bundle's configurations name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .checks import is_whole
from .errors import BundleError


def read_end_tokens(bundle: Bundle) -> frozenset[int]:
    """The end tokens of generation_config.json, or of config.json where that names none.

    Raises:
        BundleError: a configuration is no JSON object, or names something else.
    """
    for name in ("generation_config.json", "config.json"):
        if name not in bundle.manifest.files:
            continue
        path = bundle.root / name
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise BundleError(f"{path}: expected a JSON object, found text that is none") from error
        if found is not None:
            return frozenset(_token_list(found, path))
    return frozenset()


def _token_list(found: Any, path: Path) -> list[int]:
    listed = found if isinstance(found, list) else [found]
    if not all(map(is_whole, listed)):
        raise BundleError(f"{path}: eos_token_id: expected a token id or a list of them, found {found!r}")
    return listed
