"""The command line: its output, its files, its exit codes; a library's error is one line, a bug keeps its traceback."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefix_export
from prefix_export.build import recipe as build_module
from prefix_export.build import request as request_module
from prefix_export.cli import main as cli
from prefix_export.errors import PrefixExportError
from prefix_export.models import load_base_model
from prefix_runtime import Bundle
from tests.export.conftest import read_prefix

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def model(workshop):
    return workshop.model("gpt2", tokenizer=True)


@pytest.fixture(scope="module")
def prefix_file(workshop, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("prefix") / "own.safetensors"
    read_prefix(workshop.adapter(model, 3), load_base_model(str(model)).shape).save(path)
    return path


@pytest.fixture(scope="module")
def built(workshop, model, prefix_file, tmp_path_factory):
    """A process that built a bundle of two prefixes in its own folder, its output going into pipes."""
    place = tmp_path_factory.mktemp("cli")
    prefixes = ("--prefix", f"e2e={workshop.adapter(model, 20)}", "--prefix", prefix_file)
    run = subprocess.run(
        [sys.executable, "-m", "prefix_export", "build", "--model", model, *prefixes],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return place / "bundle", run


@pytest.fixture(scope="module")
def made(built):
    """The bundle; not to be changed."""
    return built[0]


@pytest.fixture
def bundle(made, tmp_path):
    """A copy of it, to be changed and broken."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def invoke(*arguments, **options):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], **options)


def succeed(*arguments, **options):
    result = invoke(*arguments, **options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def fail(*arguments, status=1, **options):
    """What the command says when it ends with this status: one line for an error of the library."""
    result = invoke(*arguments, **options)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == status
    assert result.stdout == ""
    if status == 1:
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_build_in_a_pipe_prints_a_summary_and_nothing_else(built):
    folder, run = built
    assert (run.returncode, run.stderr) == (0, "")
    header, *table = run.stdout.splitlines()
    assert header.startswith(
        "bundle: gpt2-0-text (GPT2LMHeadModel), 3 layers, 4 key/value heads of 16, context 320; fp32"
    )
    rows = {re.split(r"\s{2,}", line)[0]: line for line in table if line.rstrip().endswith("equal")}
    assert set(rows) == {"(no prefix)", "e2e", "own"}
    assert "transformers" in rows["(no prefix)"]
    assert "peft" in rows["e2e"]
    assert "\x1b" not in run.stdout
    assert max(map(len, table)) <= 120
    assert Bundle.open(folder).tasks == ("e2e", "own")


def test_the_bundle_that_was_built_verifies(made):
    assert succeed("verify", made) == f"{made}: 8 files and 2 prefixes match the manifest\n"


def test_verify_with_the_model_compares_every_task_with_it(made, model):
    lines = succeed("verify", made, "--model", model).splitlines()
    assert [line.split(": agrees with transformers")[0] for line in lines[1:]] == ["the bare model", "e2e", "own"]


def test_verify_with_another_model_fails(made, workshop):
    result = invoke("verify", made, "--model", workshop.model("gpt2", seed=1))
    assert result.exit_code == 1
    assert "expected the bundle's base model 'gpt2-0-text', found other weights" in result.stderr


def test_verify_names_the_file_that_was_changed(bundle):
    data = bundle / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    assert f"{data}: expected SHA-256 " in fail("verify", bundle)


def test_inspect_shows_a_bundle(made):
    shown = succeed("inspect", made)
    for part in (
        "gpt2-0-text (GPT2LMHeadModel)",
        "sha256:",
        "feed, fast flavour, for cpu",
        "keys and values  fp32",
        "e2e (prefix length 20",
    ):
        assert part in shown
    assert json.loads(succeed("inspect", made, "--json")) == json.loads((made / "manifest.json").read_text())


def test_inspect_shows_a_prefix_file(prefix_file):
    assert "prefix length    3" in succeed("inspect", prefix_file)
    shown = json.loads(succeed("inspect", prefix_file, "--json"))
    assert (shown["format"], shown["layers"], shown["head size"]) == ("prefix file", "3", "16")


def test_inspect_shows_an_adapter(workshop, model):
    adapter = workshop.adapter(model, 20)
    for path in (adapter, adapter / "adapter_model.safetensors"):
        shown = json.loads(succeed("inspect", path, "--json"))
        assert shown["format"] == "PEFT adapter"
        assert (shown["prefix length"], shown["layers"]) == ("20", "3")
    assert "PEFT adapter" in succeed("inspect", adapter)


def test_tasks_are_listed(made):
    assert [line.split("\t")[:2] for line in succeed("tasks", "list", made).splitlines()] == [
        ["e2e", "prefix length 20"],
        ["own", "prefix length 3"],
    ]
    listed = json.loads(succeed("tasks", "list", made, "--json"))
    assert listed["own"]["position_base"] == 3


def test_an_adapter_folder_is_added_as_a_task_and_answers_as_pefts_model(bundle, workshop, model):
    adapter = workshop.adapter(model, 5)
    assert succeed("tasks", "add", bundle, f"new={adapter}") == f"added new to {bundle}\n"
    assert Bundle.open(bundle).tasks == ("e2e", "new", "own")
    said = json.loads(succeed("generate", bundle, PROMPT, "--task", "new", "--max-new-tokens", 8, "--json"))
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = wrapped.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    assert said["token_ids"] == expected
    assert said["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_task_is_removed(bundle):
    assert succeed("tasks", "remove", bundle, "own") == f"removed own from {bundle}\n"
    assert Bundle.open(bundle).tasks == ("e2e",)
    assert [path.name for path in (bundle / "prefixes").iterdir()] == ["e2e.safetensors"]


def test_generate_answers_under_each_task(made):
    plain = succeed("generate", made, PROMPT, "--max-new-tokens", 6)
    under = succeed("generate", made, PROMPT, "--task", "e2e", "--max-new-tokens", 6)
    both = succeed("generate", made, PROMPT, "--task", "e2e", "--task", "own", "--max-new-tokens", 6)
    assert plain != under
    assert both.startswith(f"── e2e\n{under}── own\n")
    assert succeed("generate", made, "--task", "e2e", "--max-new-tokens", 6, input=PROMPT) == under


def captured_request(monkeypatch, *arguments):
    """The request that `build` was called with."""
    requests = []

    def capture(request, _progress):
        requests.append(request)
        raise PrefixExportError("that is enough")

    monkeypatch.setattr(build_module, "build", capture)
    for check in ("check_request", "check_sources"):  # of files that are not there
        monkeypatch.setattr(request_module, check, lambda _: None)
    assert fail("build", *arguments) == "Error: that is enough\n"
    return requests[0]


def test_build_passes_on_what_it_was_told(monkeypatch, tmp_path):
    request = captured_request(
        monkeypatch, "--model", "org/m", "--output", tmp_path / "o", "--max-length", 77, "--no-verify"
    )
    assert request == build_module.BuildRequest("org/m", {}, tmp_path / "o", 77, verify=False)
    plain = captured_request(monkeypatch, "--model", "org/m")
    assert plain == build_module.BuildRequest("org/m", {}, Path("bundle"))


@pytest.mark.parametrize(
    ("argument", "task", "path"),
    [
        ("xsum=e2e", "xsum", "e2e"),
        ("e2e", "e2e", "e2e"),
        ("e2e/", "e2e", "e2e"),
        ("e2e/adapter_model.safetensors", "e2e", "e2e/adapter_model.safetensors"),
        ("e2e/other.safetensors", "other", "e2e/other.safetensors"),
        ("x=e2e/other.safetensors", "x", "e2e/other.safetensors"),
        ("a=b", "a=b", "a=b"),
        ("x=a=b", "x", "a=b"),
        ("missing.safetensors", "missing", "missing.safetensors"),
        ("=e2e", "", "e2e"),
    ],
)
def test_a_prefix_is_named_by_its_task_or_else_by_its_file_or_folder(monkeypatch, tmp_path, argument, task, path):
    monkeypatch.chdir(tmp_path)
    for folder in ("e2e", "a=b"):
        Path(folder).mkdir()
    for file in ("adapter_model.safetensors", "other.safetensors"):
        (Path("e2e") / file).touch()
    request = captured_request(monkeypatch, "--model", "m", "--prefix", argument)
    assert request.prefixes == {task: Path(path)}


def test_held_out_text_is_of_a_task_or_of_all(monkeypatch, tmp_path):
    odd = tmp_path / "a=b.txt"
    odd.write_text("text")
    files = ["--held-out", "e2e=x.txt", "--held-out", odd]
    assert captured_request(monkeypatch, "--model", "m", *files).held_out == {"e2e": Path("x.txt"), None: odd}


def test_mode_target_and_opset_are_passed_on(monkeypatch):
    request = captured_request(monkeypatch, "--model", "m", "--mode", "bake", "--target", "web", "--opset", 22)
    assert (request.mode, request.target, request.opset, request.precision) == ("bake", "web", 22, None)


def test_several_prefixes_make_one_bundle(monkeypatch):
    request = captured_request(monkeypatch, "--model", "m", "--prefix", "a=x", "--prefix", "b=x")
    assert request.prefixes == {"a": Path("x"), "b": Path("x")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build"], "Missing option '--model'"),
        (["build", "--model", "m", "--prefix", "e2e=a", "--prefix", "e2e=b"], "two prefixes for the task 'e2e'"),
        (["build", "--model", "m", "--prefix", "a/e2e", "--prefix", "b/e2e"], "name them with TASK=PATH"),
        (["build", "--model", "m", "--max-length", "long"], "'long' is not a valid integer"),
        (["build", "--model", "m", "--flavour", "fast"], "No such option"),
        (["nonsense"], "No such command 'nonsense'"),
        (["tasks", "add"], "Missing argument 'BUNDLE'"),
        (["generate", "bundle", "hello", "--token-ids", "1"], "use either PROMPT or --token-ids"),
    ],
)
def test_a_usage_error_ends_with_status_2(arguments, said):
    assert said in fail(*arguments, status=2)


def test_a_missing_model_ends_with_status_1(tmp_path):
    said = fail("build", "--model", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert "nowhere': expected a Hub id or a folder with a config.json" in said
    assert not list(tmp_path.iterdir())


def test_a_task_name_that_cannot_be_one_ends_with_status_1(tmp_path):
    assert "found '../up'" in fail("build", "--model", "m", "--prefix", "../up=x", "--output", tmp_path / "out")


def test_an_output_that_exists_ends_with_status_1(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert f"{made}: expected nothing there yet" in fail("build", "--model", "m", "--output", made)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "{tmp}/nowhere"], "nowhere: expected a trained prefix, a file or a folder, found nothing there"),
        (["verify", "{tmp}"], "expected a bundle (a folder with manifest.json), found none"),
        (["tasks", "list", "{tmp}"], "expected a bundle"),
        (["tasks", "remove", "{bundle}", "nope"], "task 'nope': there is none of this name; tasks here: e2e, own"),
        (["tasks", "add", "{bundle}", "own={adapter}"], "task 'own': there is already 'own'"),
        (["tasks", "add", "{bundle}", "up/../x={adapter}"], "found 'up/../x'"),
        (["tasks", "add", "{bundle}", "x={tmp}/nowhere"], "found nothing there"),
        (["tasks", "add", "{bundle}", "x={alien}"], "expected 4 key/value heads, found 2"),
        (["generate", "{bundle}", "hi", "--task", "nope"], "tasks here: e2e, own"),
        (["generate", "{bundle}", "", "--task", "e2e"], "expected at least one token"),
        (["generate", "{bundle}", "--token-ids", "1,x"], "--token-ids: expected whole numbers"),
        (["generate", "{bundle}", "--token-ids", "384"], "expected 0 to 383, found 384"),
        (["generate", "{bundle}", "hi", "--max-new-tokens", "999"], "expected at most 320 tokens"),
    ],
)
def test_an_error_of_the_library_is_one_line_and_status_1_and_changes_nothing(
    bundle, workshop, model, tmp_path, arguments, said
):
    places = {
        "tmp": tmp_path,
        "bundle": bundle,
        "adapter": workshop.adapter(model, 20),
        "alien": workshop.adapter(workshop.model("llama"), 5),
    }
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert said in fail(*(argument.format(**places) for argument in arguments))
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(build_module, "build", lambda *_: 1 / 0)
    assert isinstance(invoke("build", "--model", "m").exception, ZeroDivisionError)


def test_warnings_go_to_stderr(monkeypatch, made, tmp_path):
    result = build_module.BuildResult(Bundle.open(made), {}, {}, 1.0, ("mind the gap",))
    monkeypatch.setattr(build_module, "build", lambda *_: result)
    ran = invoke("build", "--model", "m", "--output", tmp_path / "o")
    assert (ran.exit_code, ran.stderr) == (0, "warning: mind the gap\n")
    assert ran.stdout.count("not compared") == 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_on(stream, monkeypatch, **environment):
    """What a terminal or a pipe gets of two phases, one that counts layers."""
    monkeypatch.setattr(sys, "stderr", stream)
    for name, value in ({"TERM": "xterm", "COLUMNS": "100"} | environment).items():
        monkeypatch.setenv(name, value)
    with cli.showing_progress() as progress:
        progress.phase("load", detail="[bold]model")
        progress.phase("export", 30, unit="layers")
        for _ in range(31):  # a trace may run a layer twice
            progress.advance()
        progress.phase("check the graph")
    return stream.getvalue()


def test_progress_on_a_terminal_shows_phase_steps_and_time(monkeypatch):
    written = shown_on(Terminal(), monkeypatch)
    assert "load: [bold]model" in written
    assert "export" in written
    assert "30/30 layers" in written
    assert "31/30" not in written
    assert "0:00:0" in written


@pytest.mark.parametrize(("stream", "term"), [(io.StringIO(), "xterm"), (Terminal(), "dumb")], ids=["pipe", "dumb"])
def test_progress_is_silent_where_no_line_can_be_written_over(monkeypatch, stream, term):
    assert shown_on(stream, monkeypatch, TERM=term) == ""


def test_progress_has_no_colour_where_none_is_wanted(monkeypatch):
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", shown_on(Terminal(), monkeypatch))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown_on(Terminal(), monkeypatch, NO_COLOR="1"))


@pytest.mark.parametrize("columns", [20, 40])
def test_a_line_of_progress_never_wraps(monkeypatch, columns):
    written = shown_on(Terminal(), monkeypatch, COLUMNS=str(columns))
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written))
    assert any("30/30" in line for line in lines)
    assert max(map(len, lines)) <= columns


HEAVY = {"torch", "transformers", "peft", "optimum", "onnx", "onnx_ir", "onnxscript", "rich"}


@pytest.mark.parametrize("command", [["--help"], ["build", "--help"], ["--version"]], ids=" ".join)
@pytest.mark.parametrize("package", ["prefix_export", "prefix_runtime"])
def test_help_and_version_load_nothing_heavy(package, command):
    if (package, command[0]) == ("prefix_runtime", "build"):
        command = ["generate", "--help"]
    called = f"main({command!r}, standalone_mode=False)"
    script = f"import sys; from {package}.cli.main import main; {called}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    *said, modules = run.stdout.splitlines()
    assert said[0].startswith("Usage:") or prefix_export.__version__ in said[0]
    assert f"{package}.cli" in modules.split()
    assert not HEAVY & set(modules.split())


def test_a_bundle_is_inspected_without_anything_heavy(shared_bundle):
    script = (
        f"import sys; from prefix_export.cli.main import main; main(['inspect', {str(shared_bundle)!r}], "
        "standalone_mode=False); print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    *said, modules = run.stdout.splitlines()
    assert any(line.startswith("tasks") for line in said)
    assert not HEAVY & set(modules.split())


def test_both_modules_run_as_programs():
    for package, name in (("prefix_export", "prefix-export"), ("prefix_runtime", "prefix-runtime")):
        run = subprocess.run(
            [sys.executable, "-m", package, "--help"], capture_output=True, text=True, check=True, timeout=60
        )
        assert run.stdout.startswith(f"Usage: {name} [OPTIONS] COMMAND")
        assert run.stderr == ""


def commands(group, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def test_the_commands_are_those_of_the_design():
    assert {" ".join(path) for path, _ in commands(cli.main)} == {
        "build",
        "inspect",
        "verify",
        "tasks",
        "tasks list",
        "tasks add",
        "tasks remove",
        "generate",
        "bench",
        "prepare",
        "fold",
        "compose",
        "tensorrt",
        "tensorrt-refit",
    }


def test_every_command_and_option_explains_itself():
    for path, command in commands(cli.main):
        assert command.help, path
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help, (path, parameter.name)
