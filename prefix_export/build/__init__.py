"""A base model and its trained prefixes, to a bundle.

>>> from prefix_export.build import BuildRequest, build
>>> build(BuildRequest("gpt2-medium", {"e2e": "e2e.safetensors"}, "bundle"))  # doctest: +SKIP

Importing this imports nothing heavy: torch comes when `build` is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe import BuildResult, build, verify_against
    from .request import BuildRequest

__all__ = ["BuildRequest", "BuildResult", "build", "verify_against"]

_MODULES = {"BuildRequest": "request", "BuildResult": "recipe", "build": "recipe", "verify_against": "recipe"}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
