"""All errors that the runtime raises on purpose.

PrefixRuntimeError
├── BundleError                 the bundle's folder or manifest cannot be used
│   └── BundleIntegrityError    a file is missing, or differs from the manifest
├── PrefixError                 a prefix or its file is malformed
│   ├── PrefixMismatchError     a valid prefix does not fit this model
│   └── CompositionError        prefixes cannot be composed
├── TaskError                   a problem with a task's name
│   ├── TaskNameError           the text is not a valid task name
│   ├── UnknownTaskError        there is no task of this name
│   └── DuplicateTaskError      there is already a task of this name
├── RequestError                a request cannot be run
│   ├── BusyError               running requests use all permitted memory; try again later
│   └── ContextOverflowError    prefix, prompt and new tokens do not fit into the context
├── ProviderError               onnxruntime or TensorRT cannot open or run the graph
└── BenchError                  a benchmark cannot be run, or its report cannot be read or drawn

A message says what was expected, what was found, where, and what to do. Any other exception is a bug.
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
    """The bundle's folder or manifest cannot be used."""


class BundleIntegrityError(BundleError):
    """A file of the bundle is missing, or differs from the manifest: copy or build the bundle again."""


class PrefixError(PrefixRuntimeError):
    """A prefix or its file is malformed."""


class PrefixMismatchError(PrefixError):
    """A valid prefix does not fit this model."""


class CompositionError(PrefixError):
    """Prefixes cannot be composed, because they differ in something that must agree."""


class TaskError(PrefixRuntimeError):
    """A problem with a task's name."""


class TaskNameError(TaskError):
    """The text is not a valid task name."""


class UnknownTaskError(TaskError):
    """There is no task of this name; the message lists the tasks."""


class DuplicateTaskError(TaskError):
    """There is already a task of this name: choose another, or remove the task first."""


class RequestError(PrefixRuntimeError):
    """A request cannot be run; the message names the option."""


class BusyError(RequestError):
    """Running requests use all permitted memory; try the same request again later."""


class ContextOverflowError(RequestError):
    """Prefix, prompt and new tokens do not fit into the context: shorten the prompt, or ask for fewer tokens."""


class ProviderError(PrefixRuntimeError):
    """The provider, onnxruntime or TensorRT, cannot open or run the graph."""


class BenchError(PrefixRuntimeError):
    """A benchmark cannot be run, or its report cannot be read or drawn."""
