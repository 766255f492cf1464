"""What is wrong with a command is said before anything heavy is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "peft", "optimum", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "huggingface_hub",
         "rich", "matplotlib", "tensorrt_rtx_bindings"]  # fmt: skip

RUN_ALL = """
import contextlib, importlib, io, json, sys

package, heavy, commands = json.loads(sys.stdin.read())
main = importlib.import_module(f"{package}.cli.main").main
answers = []
for arguments in commands:
    output, error = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            main(arguments, prog_name="program")
    except SystemExit as ended:
        status = ended.code
    loaded = sorted(set(heavy) & set(sys.modules))
    answers.append([status, output.getvalue(), error.getvalue(), loaded])
print(json.dumps(answers))
"""


def answers(package, commands, places):
    """Exit code, standard output, standard error and heavy modules of each command, all run in one fresh process."""
    filled = [[argument.format(**places) for argument in arguments] for arguments in commands]
    run = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps([package, HEAVY, filled]),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=places["tmp"],
        env={**os.environ, "HOME": str(places["tmp"])},
    )
    return json.loads(run.stdout)


@pytest.fixture
def places(shared_bundle, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "words.txt").write_text("a b\n")
    return {"tmp": tmp_path, "bundle": shared_bundle}


BUILD = ["build", "--model", "{tmp}/model", "--output", "{tmp}/out"]
FOLD = ["fold", "{bundle}/prefixes/p3.safetensors", "--model", "{tmp}/model", "--output", "{tmp}/out"]
RANDOM = ["bench", "--model", "gpt2", "--random"]
GENERATE = ["generate", "{bundle}", "hi"]

EXPORTER = [
    ([*BUILD, "--output", "{tmp}/taken"], "taken: expected nothing there yet; remove it or choose another --output"),
    ([*BUILD, "--output", "{tmp}/no/out"], "no: expected a folder to write into, found none"),
    ([*BUILD, "--output", "~/taken"], "{tmp}/taken: expected nothing there yet"),
    ([*BUILD, "--prefix", "x/../y=a/b"], "found 'x/../y'"),
    ([*BUILD, "--prefix", "E2E=a/b", "--prefix", "e2e=a/b"], "task 'e2e': there is already 'E2E'"),
    ([*BUILD, "--prefix", "e2e={tmp}/nowhere"], "{tmp}/nowhere: expected a trained prefix, a file or a folder, found"),
    ([*BUILD, "--prefix", "e2e=~/nowhere"], "{tmp}/nowhere: expected a trained prefix"),
    ([*BUILD, "--precision", "int3"], "target cpu: precision: expected one of fp32, int8, int4, found 'int3'"),
    ([*BUILD, "--target", "gpu"], "target: expected one of cpu, cuda, portable, web, tensorrt, found 'gpu'"),
    ([*BUILD, "--mode", "fry"], "mode: expected one of feed, bake, found 'fry'"),
    ([*BUILD, "--mode", "bake"], "mode bake: expected at least one prefix to put into the graph, found none"),
    ([*BUILD, "--mode", "bake", "--target", "cpu"], "target cpu: mode: expected feed, found 'bake'"),
    ([*BUILD, "--cache", "int2"], "cache: expected one of fp32, fp16, int8, found 'int2'"),
    ([*BUILD, "--opset", "99"], "opset: expected 18 to 23, found 99"),
    ([*BUILD, "--block-size", "32"], "block size, quantizer: expected precision int8 or int4 with them, found fp32"),
    ([*BUILD, "--precision", "int8", "--block-size", "33"], "block size: expected one of 16, 32, 64, 128, 256, found"),
    ([*BUILD, "--precision", "int8", "--quantizer", "x"], "quantizer: expected one of rtn, hqq, found 'x'"),
    ([*BUILD, "--adapters", "onnx"], "adapters: expected at least one prefix to write as an adapter file, found none"),
    ([*BUILD, "--graph", "{tmp}/nowhere"], "graph {tmp}/nowhere: expected an ONNX file, found none"),
    ([*BUILD, "--max-length", "1"], "max_length: expected 2 or more, found 1"),
    ([*BUILD, "--held-out", "{tmp}/words.txt"], "held-out text: expected weights or a cache to round and compare with"),
    ([*BUILD, "--cache", "int8", "--held-out", "no.txt"], "held-out text no.txt: expected a text file, found none"),
    ([*BUILD, "--cache", "int8", "--held-out", "x={tmp}/words.txt"], "expected one of the tasks that are built"),
    ([*BUILD, "--model", "{tmp}/nowhere"], "expected a Hub id or a folder with a config.json, found no such folder"),
    (
        [*BUILD, "--model=~/nowhere"],
        "model '{tmp}/nowhere': expected a Hub id or a folder with a config.json, found",
    ),
    ([*BUILD, "--model", "{tmp}/adapter"], "found a folder without; it holds an adapter: name it with --prefix"),
    ([*FOLD, "--output", "{tmp}/taken"], "taken: expected nothing there yet"),
    ([*FOLD, "--format", "zip"], "format: expected one of prefix-export, peft, adapterhub, p-tuning-v2,"),
    ([*FOLD, "--model", "/nowhere"], "expected a Hub id or a folder with a config.json, found no such folder"),
    ([FOLD[0], "nowhere", *FOLD[2:]], "nowhere: expected a trained prefix, a file or a folder, found nothing there"),
    (["inspect", "nowhere"], "nowhere: expected a trained prefix, a file or a folder, found nothing there"),
    (["inspect", "{tmp}/taken", "--format", "zip"], "format: expected one of prefix-export"),
    (["inspect", "{tmp}/taken", "--model", "/nowhere"], "expected a Hub id or a folder with a config.json"),
    (["verify", "nowhere"], "nowhere: expected a bundle (a folder with manifest.json), found none"),
    (["verify", "{bundle}", "--model", "/nowhere"], "expected a Hub id or a folder with a config.json"),
    (["tasks", "add", "{bundle}", "p3={tmp}/taken"], "task 'p3': there is already 'p3'"),
    (["tasks", "add", "{bundle}", "a b={tmp}/taken"], "found 'a b'"),
    (["tasks", "add", "{bundle}", "new={tmp}/nowhere"], "{tmp}/nowhere: expected a trained prefix"),
    (["compose", "{bundle}/prefixes/p3.safetensors", "--output", "{tmp}/taken"], "expected nothing there yet"),
    (["compose", "nowhere", "--output", "{tmp}/out"], "nowhere: expected a whole safetensors file, found no such file"),
    ([*RANDOM, "--precision", "int3"], "target cpu: precision: expected one of fp32, int8, int4, found 'int3'"),
    ([*RANDOM, "--target", "gpu"], "target: expected one of cpu, cuda, portable, web, tensorrt, found 'gpu'"),
    ([*RANDOM, "--block-size", "32"], "block size, quantizer: expected precision int8 or int4 with them, found fp32"),
    ([*RANDOM, "--model", "./nowhere"], "expected a Hub id or a folder with a config.json, found no such folder"),
    (["tensorrt", "nowhere"], "nowhere: expected a bundle (a folder with manifest.json), found none"),
    (["tensorrt", "{bundle}", "--backend", "rt"], "backend: expected one of tensorrt-rtx, tensorrt, found 'rt'"),
    (["tensorrt", "{bundle}"], "build the bundle with --target tensorrt"),
    (["tensorrt-refit", "{bundle}", "p3=a/b", "--output", "{tmp}/taken"], "expected nothing there yet"),
    (["tensorrt-refit", "{bundle}", "p4=a/b", "--output", "{tmp}/out"], "task 'p4': there is none of this name"),
]

BOTH = [
    (["generate", "nowhere", "hi"], "nowhere: expected a bundle (a folder with manifest.json), found none"),
    (["generate", "nowhere"], "nowhere: expected a bundle (a folder with manifest.json), found none"),
    ([*GENERATE, "--task", "p4"], "task 'p4': there is none of this name; tasks here: p20, p3"),
    ([*GENERATE, "--task", "p3+p4"], "task 'p4': there is none of this name"),
    ([*GENERATE, "--provider", "tpu"], "provider: expected one of cpu, cuda, tensorrt, tensorrt-rtx, tensorrt-engine,"),
    ([*GENERATE, "--provider", "cuda"], "provider: expected cpu for a bundle of target cpu, found cuda"),
    ([*GENERATE, "--threads", "0"], "threads: expected 1 to 512, found 0"),
    ([*GENERATE, "--temperature", "-1"], "temperature: expected 0 or more, found -1.0"),
    ([*GENERATE, "--top-p", "2"], "top_p: expected above 0 and at most 1, found 2.0"),
    ([*GENERATE, "--max-new-tokens", "0"], "max_new_tokens: expected a whole number, 1 or more, found 0"),
    ([*GENERATE, "--stop", ""], "stop: expected strings of at least one character"),
    (["prepare", "nowhere"], "nowhere: expected a bundle (a folder with manifest.json), found none"),
    (["bench", "nowhere"], "nowhere: expected a bundle (a folder with manifest.json), found none"),
    (["bench", "{bundle}", "--task", "p4"], "task 'p4': there is none of this name; tasks here: p20, p3"),
    (["bench", "{bundle}", "--rounds", "0"], "rounds: expected whole numbers from 1"),
    (["bench", "{bundle}", "--provider", "tpu"], "provider: expected one of cpu"),
    (["bench", "{bundle}", "--threads", "0"], "threads: expected 1 to 512, found 0"),
    (["bench", "{bundle}", "--prompt-length", "9999"], "expected something that fits the bundle"),
    (["bench", "{bundle}", "--json", "-", "--csv", "-"], "--csv -: expected a file of its own, found that of --json"),
    (["bench", "{bundle}", "--json", "no/r.json"], "--json no/r.json: expected a file in a folder that exists, or -,"),
    (["bench", "{bundle}", "--against", "nowhere"], "expected a bundle folder or a report that `bench --json` wrote"),
    (["tasks", "list", "nowhere"], "nowhere: expected a bundle"),
    (["tasks", "remove", "{bundle}", "p4"], "task 'p4': there is none of this name"),
]

RUNTIME = [
    (["inspect", "nowhere"], "nowhere: expected a bundle"),
    (["tasks", "add", "{bundle}", "p3=nowhere"], "task 'p3': there is already 'p3'"),
    (["tasks", "add", "{bundle}", "new=nowhere"], "nowhere: expected a whole safetensors file, found no such file"),
]


@pytest.mark.parametrize(
    ("package", "cases"),
    [("prefix_export", [*EXPORTER, *BOTH]), ("prefix_runtime", [*RUNTIME, *BOTH])],
    ids=["exporter", "runtime"],
)
def test_a_mistake_is_one_line_and_imports_nothing_heavy(package, cases, places):
    before = sorted(path.name for path in places["tmp"].iterdir())
    found = answers(package, [arguments for arguments, _ in cases], places)
    for (arguments, said), (status, output, error, loaded) in zip(cases, found, strict=True):
        assert (status, output, loaded) == (1, "", []), (arguments, error)
        assert error.startswith("Error: "), arguments
        assert error.count("\n") == 1, arguments
        assert said.format(**places) in error, arguments
    assert sorted(path.name for path in places["tmp"].iterdir()) == before


USAGE = [
    (["build", "--model", "m", "--prefix", "a=x", "--prefix", "a=y"], "two prefixes for the task 'a'"),
    (["build", "--model", "m", "--prefix", "a="], "expected [TASK=]PATH, found 'a=' without a path"),
    (["build", "--model", "m", "--modle", "m"], "'--model'"),
    (["biuld"], "'build'"),
    (["fold", "--model", "m", "--output", "o"], "expected one of SOURCE, --text and --text-file"),
    (["fold", "--text", "x", "--part", "a", "--model", "m", "--output", "o"], "--part goes with SOURCE"),
    (["compose", "x", "--weight", "1", "--output", "o"], "--weight: expected --average with it, found none"),
    (["bench"], "name either BUNDLE or --model"),
    (["bench", "--model", "gpt2"], "--model needs --random"),
    (["generate", "b", "hi", "--token-ids", "1"], "use either PROMPT or --token-ids"),
]


def test_a_wrong_use_ends_with_status_2_and_imports_nothing_heavy(places):
    found = answers("prefix_export", [arguments for arguments, _ in USAGE], places)
    for (arguments, said), (status, output, error, loaded) in zip(USAGE, found, strict=True):
        assert (status, output, loaded) == (2, "", []), (arguments, error)
        assert said in error, arguments


def test_what_can_be_read_without_the_heavy_ones_is(places):
    commands = [
        ["inspect", "{bundle}"],
        ["inspect", "{bundle}/prefixes/p3.safetensors"],
        ["verify", "{bundle}"],
        ["tasks", "list", "{bundle}"],
        ["compose", "{bundle}/prefixes/p3.safetensors", "{bundle}/prefixes/p20.safetensors", "--output", "both"],
    ]
    for status, output, error, loaded in answers("prefix_export", commands, places):
        assert (status, error, loaded) == (0, "", [])
        assert output
    assert (places["tmp"] / "both").is_file()


def every_command(group, path=()):
    yield list(path)
    for name, command in getattr(group, "commands", {}).items():
        yield from every_command(command, (*path, name))


@pytest.mark.parametrize("package", ["prefix_export", "prefix_runtime"])
def test_the_help_of_every_command_and_the_version_import_nothing_heavy(package, places):
    main = __import__(f"{package}.cli", fromlist=["main"]).main
    commands = [[*path, flag] for path in every_command(main) for flag in ("--help", "-h")]
    for (status, output, error, loaded), arguments in zip(
        answers(package, [*commands, ["--version"]], places), [*commands, ["--version"]], strict=True
    ):
        assert (status, error, [name for name in loaded if name != "numpy"]) == (0, "", []), arguments
        assert output.startswith("program, version " if arguments == ["--version"] else "Usage: "), arguments
