"""The frozen base model: found, checked, loaded and identified.

`load_base_model` takes a Hub id, `ID@REVISION`, a folder, or a GGUF file. It reads the configuration first, refuses
what cannot be exported, and only then loads weights.
"""

from __future__ import annotations

from .base_model import BaseModel, base_model, cached, cast_weights, fingerprint
from .loading import load_base_model, load_config, load_decoder_config

__all__ = [
    "BaseModel",
    "base_model",
    "cached",
    "cast_weights",
    "fingerprint",
    "load_base_model",
    "load_config",
    "load_decoder_config",
]
