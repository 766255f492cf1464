"""The public names, and that none of them needs what only the exporter has."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import prefix_runtime

PUBLIC = [
    "BenchError",
    "Bundle",
    "BundleError",
    "BundleIntegrityError",
    "BusyError",
    "Chunk",
    "CompositionError",
    "ContextOverflowError",
    "Cuda",
    "DuplicateTaskError",
    "Engine",
    "GeneratedSequence",
    "GenerationConfig",
    "GenerationDefaults",
    "GenerationOptions",
    "GenerationResult",
    "Geometry",
    "LayerGeometry",
    "LayerPrefix",
    "Manifest",
    "Metrics",
    "Prefix",
    "PrefixError",
    "PrefixMismatchError",
    "PrefixRuntimeError",
    "ProviderError",
    "RequestError",
    "Sampling",
    "Source",
    "TargetScore",
    "TaskError",
    "TaskNameError",
    "UnknownTaskError",
    "load",
]

FOREIGN = ["torch", "transformers", "peft", "onnx", "onnxscript", "onnx_ir", "optimum", "prefix_export"]

WITHOUT_THEM = """
import json, sys

foreign = set(json.loads(sys.argv[1]))

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in foreign:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
for name in foreign:
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is not blocked")
"""

GENERATE = """
import prefix_runtime, prefix_runtime.cli.main

engine = prefix_runtime.load(sys.argv[2], threads=1)
print(json.dumps([engine.generate("the lazy dog", task=task, max_new_tokens=9).text for task in (None, *engine.tasks)]))
"""

LOADED = """
import json, sys
import prefix_runtime

print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

COMMAND_LINE = """
import json, sys
from click.testing import CliRunner
from prefix_runtime.cli.main import main

assert CliRunner().invoke(main, ["generate", "--help"]).exit_code == 0
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

WITHOUT_ONNXRUNTIME = """
import sys

sys.modules["onnxruntime"] = None
import prefix_runtime
from prefix_runtime.__main__ import main

bundle, sys.argv = sys.argv[1], ["prefix-runtime", "generate", sys.argv[1], "hi"]
try:
    prefix_runtime.load(bundle)
except ImportError as error:
    print(error)
main()
"""


def test_the_public_names_are_these():
    assert prefix_runtime.__all__ == PUBLIC == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented(name):
    documentation = getattr(prefix_runtime, name).__doc__
    assert documentation
    # A dataclass without a docstring of its own gets its signature.
    assert not documentation.startswith(f"{name}(")


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.endswith("Error")])
def test_every_error_has_the_one_root(name):
    assert issubclass(getattr(prefix_runtime, name), prefix_runtime.PrefixRuntimeError)


def test_the_errors_module_opens_with_its_whole_tree():
    from prefix_runtime import errors

    tree = {line.strip("├└─│ ").split()[0] for line in errors.__doc__.splitlines() if "Error" in line}
    assert tree == set(errors.__all__)
    assert set(errors.__all__) <= set(PUBLIC)


def test_it_runs_where_only_its_own_dependencies_are(python, engine, shared_bundle):
    run = python(WITHOUT_THEM + GENERATE, json.dumps(FOREIGN), shared_bundle)
    assert run.stderr == ""
    expected = [engine.generate("the lazy dog", task=task, max_new_tokens=9).text for task in (None, *engine.tasks)]
    assert json.loads(run.stdout) == expected


def test_importing_it_loads_none_of_the_exporters_modules(python):
    assert set(FOREIGN).isdisjoint(json.loads(python(LOADED).stdout))


def test_the_help_loads_none_of_the_exporters_modules(python):
    assert set(FOREIGN).isdisjoint(json.loads(python(COMMAND_LINE).stdout))


def test_without_onnxruntime_the_message_says_what_to_install(python, shared_bundle):
    run = python(WITHOUT_ONNXRUNTIME, shared_bundle)
    needed = "prefix-runtime needs onnxruntime: pip install 'prefix-runtime[cpu]'\n"
    assert (run.returncode, run.stdout, run.stderr) == (1, needed, f"Error: {needed}")


def test_public_names_are_imported_when_they_are_used(python):
    assert set(prefix_runtime._MODULES) == set(PUBLIC)
    assert set(PUBLIC) <= set(dir(prefix_runtime))
    loaded = set(json.loads(python(LOADED).stdout))
    assert loaded.isdisjoint({"numpy", "onnxruntime", "safetensors", "tokenizers"})
    with pytest.raises(AttributeError, match="module 'prefix_runtime' has no attribute 'nothing'"):
        prefix_runtime.nothing  # noqa: B018


def test_its_version_is_a_version():
    assert all(part.isdigit() for part in prefix_runtime.__version__.split("."))
    assert sys.modules["prefix_runtime"].__version__ == prefix_runtime.__version__


def test_onnxruntime_keeps_no_record_of_who_runs_it(shared_bundle, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "prefix_runtime", "tasks", "list", str(shared_bundle)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert not list(tmp_path.rglob("*onnxruntime*"))
