"""A program in C++ swaps tasks by onnxruntime's adapter files, and gets PEFT's tokens."""

from __future__ import annotations

import os
import subprocess

import pytest
from transformers import AutoTokenizer

from tests.clients.conftest import HERE, PROMPTS, ROOT, TASKS, TRAINED, node_packages, program, run

pytestmark = pytest.mark.clients

SOURCE = ROOT / "examples" / "adapters" / "tasks.cpp"


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    # The library that onnxruntime-node brings; the header is onnxruntime's own where the machine has it.
    libraries = node_packages() / "node_modules" / "onnxruntime-node" / "bin" / "napi-v6" / "linux" / "x64"
    built = tmp_path_factory.mktemp("cpp") / "tasks"
    compiler = os.environ.get("CXX") or program("g++", "c++", "clang++", install="a C++ compiler (Debian: g++)")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-idirafter", HERE / "include"]
    run([compiler, *flags, SOURCE, "-o", built, "-L", libraries, "-l:libonnxruntime.so.1", f"-Wl,-rpath,{libraries}"])
    return built


def answers(binary, bundle, ids, count, *tasks):
    """A line of new tokens for the bare model, and one for each task."""
    adapters = [bundle / "adapters" / f"{task}.onnx_adapter" for task in tasks]
    printed = run([binary, bundle / "model.onnx", ",".join(map(str, ids)), count, *adapters])
    return [list(map(int, line.split(","))) for line in printed.splitlines()]


def test_tasks_are_swapped_by_their_adapters_alone(binary, bundle_of, peft_answers):
    bundle = bundle_of(*TASKS, adapters="onnx")
    tokenizer = AutoTokenizer.from_pretrained(TRAINED.model)
    for prompt in PROMPTS:
        wanted = [peft_answers(task, [prompt])[0] for task in TASKS]
        found = answers(binary, bundle, tokenizer(prompt)["input_ids"], max(map(len, wanted)), *TASKS)
        assert [ids[: len(expected)] for ids, expected in zip(found[1:], wanted, strict=True)] == wanted
        assert found[0] not in found[1:]


def test_grouped_queries_answer_so_too(binary, bundle_of, peft_answers, grouped):
    bundle = bundle_of("p20", adapters="onnx", source=grouped)
    tokenizer = AutoTokenizer.from_pretrained(grouped.model)
    wanted = peft_answers("p20", [PROMPTS[0]], source=grouped)[0]
    found = answers(binary, bundle, tokenizer(PROMPTS[0])["input_ids"], len(wanted), "p20")
    assert found[1] == wanted


def test_another_models_adapter_is_an_error_and_no_garbage(binary, bundle_of, grouped):
    bundle = bundle_of(*TASKS, adapters="onnx")
    other = bundle_of("p20", adapters="onnx", source=grouped) / "adapters" / "p20.onnx_adapter"
    done = subprocess.run(
        [binary, bundle / "model.onnx", "5,6,7", "4", other], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "prefix." in done.stderr
    assert done.stdout.count("\n") == 1  # the bare model's answer, before
