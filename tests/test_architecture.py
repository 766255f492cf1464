"""The rules that keep knowledge flowing one way, read from the source."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

import prefix_export
import prefix_runtime

ROOT = Path(__file__).parents[1]
EXPORTER = sorted((ROOT / "prefix_export").rglob("*.py"))
RUNTIME = sorted((ROOT / "runtime" / "prefix_runtime").rglob("*.py"))
PACKAGES = [*EXPORTER, *RUNTIME]


def name_of(path):
    return str(path.relative_to(ROOT))


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path):
    """The dotted name of a module's package, as relative imports count from it."""
    base = ROOT if path in EXPORTER else ROOT / "runtime"
    return path.relative_to(base).parent.parts


def imported(path, nodes=None):
    """Dotted names of everything that a module imports, `from x import y` as `x.y`; relative ones resolved."""
    for node in ast.walk(tree(path)) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module_of(path)[: len(module_of(path)) - node.level + 1] if node.level else ()
            source = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def imported_roots(path):
    return {name.split(".")[0] for name in imported(path)}


def test_the_rules_see_imports_as_they_are():
    # The rules below would hold for anything if this helper found nothing.
    build = ROOT / "prefix_export" / "build" / "recipe.py"
    assert {
        "prefix_runtime.Bundle",
        "prefix_export.build.folding.load_and_fold",
        "prefix_export.build.request.BuildRequest",
    } <= set(imported(build))
    assert "prefix_export.formats.peft.reader" in set(imported(ROOT / "prefix_export" / "formats" / "__init__.py"))
    assert len(EXPORTER) >= 10
    assert len(RUNTIME) >= 15


def prints(path):
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    return any(isinstance(call, ast.Name) and call.id == "print" for call in calls)


def test_only_the_command_line_prints_or_knows_click():
    modules = [path for path in PACKAGES if path.parent.name != "cli"]
    assert not [name_of(path) for path in modules if "click" in imported_roots(path) or prints(path)]
    assert [path for path in PACKAGES if "click" in imported_roots(path)], "the rule sees no imports"


def test_one_module_imports_onnxruntime_and_one_its_quantizer():
    assert [name_of(path) for path in RUNTIME if "onnxruntime" in imported_roots(path)] == [
        "runtime/prefix_runtime/backends/onnxruntime/library.py"
    ]
    assert [path.name for path in EXPORTER if "onnxruntime" in imported_roots(path)] == ["rounding.py"]


LOADERS = ("from_pretrained", "from_config")


def loader_calls(path):
    """Calls of transformers' loaders by the name of what they are called on; PEFT reads tensors that it is given."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
            owner = ast.unparse(node.func.value)
            if owner != "PeftModel":
                yield owner, node


def test_only_one_module_calls_transformers_loaders_and_trusts_no_code():
    loaders = ROOT / "prefix_export" / "models" / "pretrained.py"
    others = [path for path in EXPORTER if path != loaders]
    assert not [name_of(path) for path in others if list(loader_calls(path))]
    assert not [name for path in others for name in imported(path) if name.startswith("transformers.Auto")]
    calls = list(loader_calls(loaders))
    assert len(calls) == 5
    for _, call in calls:
        trusted = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        assert trusted == ["False"]


def test_only_what_opens_checkpoints_knows_torch():
    readers = [path for path in EXPORTER if "formats" in path.parts]
    assert [path.name for path in readers if "torch" in imported_roots(path)] == ["checkpoint.py"]


COMMAND_LINE = sorted(ROOT.glob("prefix_export/cli/*.py"))
HELP = [
    *COMMAND_LINE,
    *(ROOT / "prefix_export" / name for name in ("__init__.py", "__main__.py", "errors.py", "progress.py")),
]


def test_nothing_heavy_is_imported_at_the_top_of_what_help_needs():
    allowed = {"__future__", "click", "collections", "contextlib", "dataclasses", "os", "pathlib", "prefix_export",
               "prefix_runtime", "sys", "tempfile", "time", "typing"}  # fmt: skip
    top = {name for path in HELP for name in imported(path, tree(path).body)}
    assert {name.split(".")[0] for name in top} <= allowed
    own = {name for name in top if name.startswith("prefix_export.")}
    light = {"prefix_export.__version__", "prefix_export.errors", "prefix_export.progress"}
    light |= {f"prefix_export.cli.{module.stem}" for module in COMMAND_LINE}
    assert {name if name in light else name.rpartition(".")[0] for name in own} <= light


def public(node, path=""):
    """Public functions and classes, with the methods of public classes; overloads share their function's docstring."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if not any(isinstance(item, ast.Name) and item.id == "overload" for item in child.decorator_list):
                yield f"{path}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{path}{child.name}.")


def test_every_public_name_has_a_docstring():
    assert not [name_of(path) for path in PACKAGES if not ast.get_docstring(tree(path))]
    names = [(path, name, node) for path in PACKAGES for name, node in public(tree(path))]
    assert not [f"{name_of(path)}: {name}" for path, name, node in names if not ast.get_docstring(node)]
    assert len(names) > 500


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_a_module_can_be_read_in_one_sitting():
    assert not {name_of(path): len(lines_of(path)) for path in PACKAGES if len(lines_of(path)) > 400}


def test_what_is_left_to_do_names_its_issue():
    lines = [(path, line) for path in PACKAGES for line in lines_of(path)]
    unfinished = [(path, line) for path, line in lines if re.search(r"\b(TODO|FIXME|XXX)\b", line)]
    assert not [f"{name_of(path)}: {line}" for path, line in unfinished if not re.search(r"#\d+", line)]


def test_sibling_versions_are_equal():
    assert prefix_export.__version__ == prefix_runtime.__version__
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pin,) = [dependency for dependency in dependencies if dependency.startswith("prefix-runtime")]
    assert re.fullmatch(rf"prefix-runtime(\[cpu\])?=={re.escape(prefix_runtime.__version__)}", pin)


def test_the_runtimes_project_folder_is_no_package():
    assert (ROOT / "runtime" / "pyproject.toml").is_file()
    assert not (ROOT / "runtime" / "__init__.py").exists()


@pytest.mark.parametrize("project", [".", "runtime"])
def test_a_distribution_declares_what_it_imports(project):
    # Of the modules' own names, but for distributions of another; the standard library and the siblings aside.
    modules = {"cuda_bindings": "cuda"}
    declared = tomllib.loads((ROOT / project / "pyproject.toml").read_text())["project"]
    listed = [*declared["dependencies"], *chain(*declared["optional-dependencies"].values())]
    names = {re.match(r"[A-Za-z0-9-]+", line)[0].replace("-", "_").lower() for line in listed}
    names |= {modules[name] for name in names & modules.keys()}
    used = set().union(*map(imported_roots, EXPORTER if project == "." else RUNTIME))
    assert used - set(sys.stdlib_module_names) - {"prefix_export", "prefix_runtime"} <= names


@pytest.mark.parametrize(
    "package", [ROOT / "prefix_export", ROOT / "runtime" / "prefix_runtime"], ids=lambda path: path.name
)
def test_a_folder_can_be_looked_over(package):
    folders = [package, *(path for path in package.rglob("*") if path.is_dir())]
    modules = {folder: [path for path in folder.glob("*.py") if path.name != "__init__.py"] for folder in folders}
    assert not {folder: len(found) for folder, found in modules.items() if len(found) > 15}


def test_git_and_wheels_leave_no_folder_of_the_packages_out():
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    anywhere = {line.strip("/") for line in lines if not line.startswith("/")}
    assert anywhere.isdisjoint({part for path in PACKAGES for part in path.relative_to(ROOT).parts})
