"""Every error that the runtime raises on purpose.

PrefixRuntimeError
├── BundleError                 the bundle folder or its manifest cannot be used
│   └── BundleIntegrityError    a file is missing, resized or not the one that the manifest names
├── PrefixError                 a prefix, or the file that should hold one, is malformed
│   ├── PrefixMismatchError     a sound prefix that does not fit this model
│   └── CompositionError        prefixes that cannot be composed
├── TaskError                   something about a task's name
│   ├── TaskNameError           a name that cannot be one
│   ├── UnknownTaskError        no task of this name
│   └── DuplicateTaskError      the name is taken
├── RequestError                what `generate` was asked for cannot be done
│   ├── BusyError               running requests take all the memory that they may
│   └── ContextOverflowError    prefix, prompt and new tokens do not fit the context
├── ProviderError               onnxruntime cannot open or run the graph
└── BenchError                  what `bench` was asked for cannot be done, or its report cannot be read or shown

A message says what was expected, what was found, where, and what to do. Anything else that escapes is a bug.
"""

from __future__ import annotations

__all__ = [
    "BenchError",
    "BundleError",
    "BundleIntegrityError",
    "BusyError",
    "CompositionError",
    "ContextOverflowError",
    "DuplicateTaskError",
    "PrefixError",
    "PrefixMismatchError",
    "PrefixRuntimeError",
    "ProviderError",
    "RequestError",
    "TaskError",
    "TaskNameError",
    "UnknownTaskError",
]


class PrefixRuntimeError(Exception):
    """Root of every error that the runtime raises on purpose."""


class BundleError(PrefixRuntimeError):
    """The bundle folder or its manifest cannot be used."""


class BundleIntegrityError(BundleError):
    """A file of the bundle is missing, resized or not the one that the manifest names."""


class PrefixError(PrefixRuntimeError):
    """A prefix, or the file that should hold one, is malformed."""


class PrefixMismatchError(PrefixError):
    """A sound prefix that does not fit this model."""


class CompositionError(PrefixError):
    """Prefixes that make no sense together."""


class TaskError(PrefixRuntimeError):
    """Something about a task's name."""


class TaskNameError(TaskError):
    """A name that cannot name a task."""


class UnknownTaskError(TaskError):
    """No task of this name."""


class DuplicateTaskError(TaskError):
    """The name is taken."""


class RequestError(PrefixRuntimeError):
    """What `generate` was asked for cannot be done."""


class BusyError(RequestError):
    """Running requests take all the memory that they may; the same request may be answered later."""


class ContextOverflowError(RequestError):
    """Prefix, prompt and new tokens do not fit the context."""


class ProviderError(PrefixRuntimeError):
    """onnxruntime cannot open or run the graph."""


class BenchError(PrefixRuntimeError):
    """What `bench` was asked for cannot be done, or its report cannot be read or shown."""
