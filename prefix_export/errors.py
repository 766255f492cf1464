"""Every error that the exporter raises on purpose; those of what is on disk or runs are prefix_runtime's.

PrefixExportError
├── ModelError                       the base model cannot be found, loaded or used
│   └── UnsupportedArchitectureError   its attention cannot be exported
├── CheckpointError                  a trained checkpoint cannot be read as a prefix
├── ExportError                      the graph cannot be made
│   └── EngineError                    no TensorRT engine can be made of it
└── ParityError                      the exported graph does not agree with the source framework

A message says what was expected, what was found, where, and what to do. Anything else that escapes is a bug.
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
    """The base model's attention cannot be exported."""


class CheckpointError(PrefixExportError):
    """A trained checkpoint cannot be read as a prefix."""


class ExportError(PrefixExportError):
    """The graph cannot be made."""


class EngineError(ExportError):
    """No TensorRT engine can be made of the graph."""


class ParityError(PrefixExportError):
    """The exported graph does not agree with the source framework."""
