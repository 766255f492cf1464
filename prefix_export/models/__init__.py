"""Find, check, load and identify the frozen base model.

`load_base_model` takes a Hub id, `ID@REVISION`, a folder, or a GGUF file. It reads the configuration first, refuses
models that cannot be exported, and only then loads weights.

Importing this package is fast: torch is imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base_model import BaseModel, cached, cast_weights, fingerprint
    from .loading import load_base_model, load_config, load_decoder_config

__all__ = [
    "BaseModel",
    "cached",
    "cast_weights",
    "fingerprint",
    "load_base_model",
    "load_config",
    "load_decoder_config",
]

_LOADING = frozenset(name for name in __all__ if name.startswith("load_"))


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(".loading" if name in _LOADING else ".base_model", __name__), name)
    globals()[name] = value
    return value
