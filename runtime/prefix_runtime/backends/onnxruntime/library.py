"""onnxruntime itself: the one module that imports it."""

from __future__ import annotations

import os

# onnxruntime 1.32 notes every process in a database under the user's cache folder, for its makers. What runs on other
# people's devices does so only where its user says so, by setting this variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    import onnxruntime as ort
except ImportError as error:
    message = "prefix-runtime needs onnxruntime: pip install 'prefix-runtime[cpu]'"
    raise ImportError(message, name="onnxruntime") from error

__all__ = ["onnxruntime_version", "ort"]


def onnxruntime_version() -> str:
    """Of what runs graphs here."""
    version: str = ort.__version__
    return version
