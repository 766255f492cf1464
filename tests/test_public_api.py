"""The names that others may rely on."""

from __future__ import annotations

import re

import pytest

import prefix_export.build.recipe
import prefix_export.build.request
import prefix_export.errors
import prefix_runtime
import prefix_runtime.errors

EXPORTER_ERRORS = [
    "CheckpointError",
    "EngineError",
    "ExportError",
    "ModelError",
    "ParityError",
    "PrefixExportError",
    "UnsupportedArchitectureError",
]
RUNTIME_ERRORS = [
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

each_package = pytest.mark.parametrize(
    ("module", "names"),
    [(prefix_export.errors, EXPORTER_ERRORS), (prefix_runtime.errors, RUNTIME_ERRORS)],
    ids=["prefix_export", "prefix_runtime"],
)


def drawn(module):
    """Each error's parent, as the tree in the module's docstring draws it; the root's is Exception."""
    parents, branch = {}, ["Exception"]
    for line in module.__doc__.splitlines():
        match = re.fullmatch(r"((?:│   |    )*(?:[├└]── )?)(\w+Error)(?: .*)?", line)
        if match:
            depth = len(match[1]) // 4
            branch = [*branch[: depth + 1], match[2]]
            parents[match[2]] = branch[depth]
    return parents


def classes(module):
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module.__name__
    }


@each_package
def test_errors_are_these(module, names):
    assert module.__all__ == names == sorted(classes(module))


@each_package
def test_the_drawn_tree_of_errors_is_the_real_one(module, names):
    assert drawn(module) == {name: classes(module)[name].__bases__[0].__name__ for name in names}
    assert all(len(error.__bases__) == 1 for error in classes(module).values())


def test_the_two_families_of_errors_are_apart():
    assert not issubclass(prefix_export.errors.PrefixExportError, prefix_runtime.PrefixRuntimeError)
    assert not issubclass(prefix_runtime.PrefixRuntimeError, prefix_export.errors.PrefixExportError)


def test_the_exporters_recipe_has_these_names():
    own = ["BuildRequest", "BuildResult", "build", "verify_against"]
    assert prefix_export.build.__all__ == own
    assert all(getattr(prefix_export.build, name).__name__ == name for name in own)


def test_a_build_request_has_these_fields():
    fields = prefix_export.build.BuildRequest.__dataclass_fields__
    assert list(fields) == [
        "model",
        "prefixes",
        "output",
        "max_length",
        "mode",
        "target",
        "opset",
        "graph",
        "adapters",
        "precision",
        "block_size",
        "quantizer",
        "cache",
        "held_out",
        "verify",
    ]


def test_a_build_result_has_these_fields():
    assert list(prefix_export.build.BuildResult.__dataclass_fields__) == [
        "bundle",
        "parity",
        "quality",
        "seconds",
        "warnings",
        "phase_seconds",
    ]
