"""All errors that the exporter raises on purpose. `prefix_runtime` has the errors of bundles and of running them.

PrefixExportError
├── ModelError                       the base model cannot be found, loaded or used
│   └── UnsupportedArchitectureError   its architecture cannot be exported
├── CheckpointError                  a trained checkpoint cannot be read as a prefix
├── ExportError                      the graph cannot be exported
│   └── EngineError                    the TensorRT engine cannot be built
└── ParityError                      the exported graph does not agree with the source framework

A message says what was expected, what was found, where, and what to do. Any other exception is a bug.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "EngineError",
    "ExportError",
    "ModelError",
    "ParityError",
    "PrefixExportError",
    "UnsupportedArchitectureError",
]


class PrefixExportError(Exception):
    """Root of every error that the exporter raises on purpose."""


class ModelError(PrefixExportError):
    """The base model cannot be found, loaded or used."""


class UnsupportedArchitectureError(ModelError):
    """The base model's architecture cannot be exported."""


class CheckpointError(PrefixExportError):
    """A trained checkpoint cannot be read as a prefix."""


class ExportError(PrefixExportError):
    """The graph cannot be exported."""


class EngineError(ExportError):
    """The TensorRT engine cannot be built from the graph."""


class ParityError(PrefixExportError):
    """The exported graph does not agree with the source framework."""
