"""The command line: what it prints agrees with the library; what fails ends in one line and the right exit code."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace

import click
import pytest
from click.testing import CliRunner

import prefix_runtime
from prefix_runtime import Bundle, Prefix, Sampling
from prefix_runtime.cli.main import main, split_task

PROMPT = "the lazy dog"
COMMANDS = [[], ["inspect"], ["verify"], ["tasks"], ["tasks", "list"], ["tasks", "add"], ["tasks", "remove"]]
COMMANDS += [["generate"], ["bench"]]


@pytest.fixture
def cli():
    """Runs the command line in this process."""
    return lambda *arguments, **options: CliRunner().invoke(main, [*map(str, arguments)], **options)


@pytest.fixture
def printed(cli):
    """What a command prints when all is well."""

    def output_of(*arguments, **options):
        result = cli(*arguments, **options)
        assert (result.exit_code, result.stderr) == (0, "")
        return result.stdout

    return output_of


@pytest.fixture
def refused(cli):
    """The one line that a command ends with when the library refuses."""

    def line_of(*arguments, **options):
        result = cli(*arguments, **options)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr.strip()

    return line_of


@pytest.fixture
def prefix_file(make_prefix, tmp_path):
    make_prefix(5).save(tmp_path / "new.safetensors")
    return tmp_path / "new.safetensors"


@pytest.fixture
def shell():
    """Runs `python -m prefix_runtime` in an interpreter of its own."""

    def run(*arguments, **options):
        command = [sys.executable, "-m", "prefix_runtime", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, timeout=120, check=False, **options)

    return run


class TestInspect:
    def test_a_bundle_is_told(self, printed, shared_bundle):
        told = dict(line.split("  ", 1) for line in printed("inspect", shared_bundle).splitlines())
        told = {name: value.strip() for name, value in told.items()}
        assert {name: told[name] for name in ("layers", "key/value heads", "head size", "context")} == {
            "layers": "3",
            "key/value heads": "4",
            "head size": "16",
            "context": "320 positions, 320 used",
        }
        assert told["fingerprint"] == Bundle.open(shared_bundle).manifest.model.fingerprint
        assert "p20 (prefix length 20, agrees with peft" in told["tasks"]

    def test_generation_defaults_are_told_and_what_is_not_followed(self, printed, bundle, rewrite):
        rewrite(bundle, "generation_config.json", b'{"eos_token_id": [0, 5], "suppress_tokens": [3], "min_length": 7}')
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["generation"]["not_followed"] = {"max_time": 4.0}
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        told = dict(line.split("  ", 1) for line in printed("inspect", bundle).splitlines())
        assert told["generation"].strip() == "greedy, min_length 7, suppress_tokens [3]"
        assert told["end tokens"].strip() == "0, 5"
        assert told["not followed"].strip() == "max_time 4.0"

    def test_a_task_that_was_added_is_told_as_not_compared(self, printed, bundle, prefix_file):
        printed("tasks", "add", bundle, prefix_file)
        assert "new (prefix length 5, not compared)" in printed("inspect", bundle)

    def test_a_bundle_without_tasks_says_so(self, printed, bundle):
        for task in ("p3", "p20"):
            printed("tasks", "remove", bundle, task)
        assert printed("inspect", bundle).splitlines()[-1].split() == ["tasks", "none"]
        assert printed("tasks", "list", bundle) == ""

    def test_a_bundle_as_json_is_its_manifest(self, printed, shared_bundle):
        told = json.loads(printed("inspect", shared_bundle, "--json"))
        assert told == json.loads((shared_bundle / "manifest.json").read_text())

    def test_a_prefix_file_is_told(self, printed, prefix_file):
        expected = Prefix.load(prefix_file).describe()
        assert json.loads(printed("inspect", prefix_file, "--json")) == expected
        lines = printed("inspect", prefix_file).splitlines()
        assert [line.split("  ")[-1].strip() for line in lines] == list(expected.values())

    def test_what_is_neither_is_refused(self, refused, tmp_path):
        (tmp_path / "text").write_text("text")
        assert "expected a whole safetensors file" in refused("inspect", tmp_path / "text")
        assert "expected a bundle" in refused("inspect", tmp_path)
        assert "expected a bundle" in refused("inspect", tmp_path / "missing")


class TestVerify:
    def test_a_whole_bundle_is_told_in_one_line(self, printed, shared_bundle):
        line = printed("verify", shared_bundle)
        assert line == f"{shared_bundle}: 8 files and 2 prefixes match the manifest\n"

    @pytest.mark.parametrize("name", ["model.onnx.data", "prefixes/p3.safetensors", "tokenizer.json"])
    def test_a_damaged_file_is_named(self, refused, bundle, name):
        content = bytearray((bundle / name).read_bytes())
        content[-9] ^= 1
        (bundle / name).write_bytes(content)
        assert refused("verify", bundle).startswith(f"Error: {bundle / name}: expected SHA-256 ")

    def test_a_prefix_that_is_none_is_named(self, refused, bundle, rewrite):
        rewrite(bundle, "prefixes/p3.safetensors", b"damaged")
        assert refused("verify", bundle).startswith(f"Error: {bundle}/prefixes/p3.safetensors: expected a whole")

    def test_a_missing_file_is_named(self, refused, bundle):
        (bundle / "model.onnx").unlink()
        assert "model.onnx: expected a file of" in refused("verify", bundle)


class TestTasks:
    def test_they_are_listed(self, printed, shared_bundle):
        lines = [line.split("\t") for line in printed("tasks", "list", shared_bundle).splitlines()]
        sizes = {task: (shared_bundle / f"prefixes/{task}.safetensors").stat().st_size for task in ("p3", "p20")}
        assert lines == [
            ["p20", "prefix length 20", f"{sizes['p20']} bytes"],
            ["p3", "prefix length 3", f"{sizes['p3']} bytes"],
        ]

    def test_as_json_they_are_those_of_the_manifest(self, printed, shared_bundle):
        told = json.loads(printed("tasks", "list", shared_bundle, "--json"))
        assert told == json.loads((shared_bundle / "manifest.json").read_text())["tasks"]

    @pytest.mark.parametrize(("as_name", "name"), [("", "new"), ("other=", "other")])
    def test_an_added_task_is_there(self, printed, bundle, prefix_file, as_name, name):
        assert printed("tasks", "add", bundle, f"{as_name}{prefix_file}") == f"added {name} to {bundle}\n"
        assert Bundle.open(bundle).prefix(name) == Prefix.load(prefix_file)
        assert json.loads(printed("generate", bundle, PROMPT, "--task", name, "--json"))["task"] == name

    def test_a_removed_task_is_gone(self, printed, bundle):
        assert printed("tasks", "remove", bundle, "p3") == f"removed p3 from {bundle}\n"
        assert Bundle.open(bundle).tasks == ("p20",)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["remove", "{bundle}", "p4"], "task 'p4': there is none of this name; tasks here: p20, p3"),
            (["add", "{bundle}", "p3={file}"], "task 'p3': there is already 'p3'"),
            (["add", "{bundle}", "P3={file}"], "task 'P3': there is already 'p3'"),
            (["add", "{bundle}", "../x={file}"], "task name: expected 1 to 64 letters"),
            (["add", "{bundle}", "={file}"], "task name: expected 1 to 64 letters"),
            (["add", "{bundle}", "new={file}.missing"], "found no such file"),
            (["add", "{bundle}", "{bundle}"], "found a folder"),
            (["add", "{bundle}", "{bundle}/model.onnx"], "expected a whole safetensors file"),
            (["add", "{file}", "{file}"], "expected a bundle"),
            (["list", "{file}"], "expected a bundle"),
        ],
    )
    def test_what_cannot_be_done_is_refused_and_the_bundle_is_as_it_was(
        self, refused, bundle, prefix_file, arguments, message
    ):
        before = (bundle / "manifest.json").read_bytes()
        assert message in refused("tasks", *(part.format(bundle=bundle, file=prefix_file) for part in arguments))
        assert (bundle / "manifest.json").read_bytes() == before

    def test_a_prefix_for_another_model_is_refused(self, refused, bundle, make_prefix, tmp_path):
        make_prefix(layers=2).save(tmp_path / "other")
        assert "expected 3 layers, found 2" in refused("tasks", "add", bundle, tmp_path / "other")

    def test_a_full_disk_is_told_in_one_line(self, refused, bundle, prefix_file, monkeypatch):
        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        line = refused("tasks", "add", bundle, prefix_file)
        assert line.startswith(f"Error: {bundle}/prefixes/new.safetensors: ")
        assert ".partial" not in line
        assert Bundle.open(bundle).tasks == ("p20", "p3")

    @pytest.mark.parametrize(
        ("text", "name", "path"),
        [
            ("a/b/e2e.safetensors", "e2e", "a/b/e2e.safetensors"),
            ("e2e=some/path", "e2e", "some/path"),
            ("e2e=some=path", "e2e", "some=path"),
            ("dir/e2e/adapter_model.safetensors", "e2e", "dir/e2e/adapter_model.safetensors"),
            ("v1.2.safetensors", "v1.2", "v1.2.safetensors"),
            ("owner/adapter@v1.0", "adapter", "owner/adapter@v1.0"),
            ("owner/adapter/support@refs/pr/3", "support", "owner/adapter/support@refs/pr/3"),
        ],
    )
    def test_the_name_is_the_given_one_or_the_files(self, text, name, path):
        found, at = split_task(text)
        assert (found, str(at)) == (name, path)

    def test_a_folder_gives_its_own_name(self, tmp_path):
        (tmp_path / "e2e.v2").mkdir()
        assert split_task(str(tmp_path / "e2e.v2"))[0] == "e2e.v2"

    def test_a_file_whose_name_has_an_equals_sign_is_found(self, tmp_path):
        path = tmp_path / "a=b.safetensors"
        path.touch()
        assert split_task(str(path)) == ("a=b", path)


class TestGenerate:
    @pytest.mark.parametrize("task", [None, "p3", "p20"])
    def test_it_streams_the_text_of_the_engine(self, printed, engine, shared_bundle, task):
        expected = engine.generate(PROMPT, task=task, max_new_tokens=20).text
        options = ["--task", task] if task else []
        assert printed("generate", shared_bundle, PROMPT, *options, "--max-new-tokens", 20) == f"{expected}\n"

    def test_as_json_it_prints_the_result_of_the_engine_a_line_each(self, printed, engine, shared_bundle):
        output = printed(
            "generate", shared_bundle, PROMPT, "--task", "p3", "--task", "p20", "--max-new-tokens", 12, "--json"
        )
        told = [json.loads(line) for line in output.splitlines()]
        results = [engine.generate(PROMPT, task=task, max_new_tokens=12) for task in ("p3", "p20")]
        for line, result in zip(told, results, strict=True):
            assert {name: line[name] for name in ("task", "text", "finish_reason")} == {
                "task": result.task,
                "text": result.text,
                "finish_reason": result.finish_reason,
            }
            assert line["token_ids"] == list(result.token_ids)
            metrics = line["metrics"]
            assert metrics.keys() >= asdict(result.metrics).keys()
            assert metrics["new_tokens"] == len(result.token_ids) == len(metrics["inter_token_latencies"]) + 1
            assert 0 < metrics["inter_token_latency"] < math.inf

    def test_json_knows_no_nan(self, printed, shared_bundle):
        def refuse(constant):
            pytest.fail(f"{constant} is no JSON")

        line = printed("generate", shared_bundle, PROMPT, "--max-new-tokens", 1, "--json")
        assert json.loads(line, parse_constant=refuse)["metrics"]["inter_token_latency"] is None

    @pytest.mark.parametrize("ids", ["5,6,7", " 5, 6 ,7", "383"])
    def test_token_ids_are_taken(self, printed, engine, shared_bundle, ids):
        line = printed("generate", shared_bundle, "--token-ids", ids, "--json", "--max-new-tokens", 5)
        expected = engine.generate(token_ids=[int(part) for part in ids.split(",")], max_new_tokens=5).token_ids
        assert json.loads(line)["token_ids"] == list(expected)

    def test_the_prompt_is_read_from_standard_input(self, printed, engine, shared_bundle):
        expected = engine.generate("é 😀", max_new_tokens=9).text
        assert printed("generate", shared_bundle, "--max-new-tokens", 9, input="é 😀") == f"{expected}\n"
        assert printed("generate", shared_bundle, "--max-new-tokens", 9, input="é 😀\n") == f"{expected}\n"

    def test_several_tasks_are_headed_by_their_names(self, printed, engine, shared_bundle):
        texts = {task: engine.generate(PROMPT, task=task, max_new_tokens=6).text for task in ("p20", "p3")}
        expected = "".join(f"── {task}\n{text}\n" for task, text in texts.items())
        options = ["--task", "p20", "--task", "p3", "--max-new-tokens", 6]
        assert printed("generate", shared_bundle, PROMPT, *options) == expected

    def test_every_setting_reaches_the_engine(self, printed, engine, shared_bundle):
        sampling = Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=7)
        stop = ["z", "q"]
        expected = engine.generate(PROMPT, task="p3", max_new_tokens=50, sampling=sampling, stop=stop)
        flags = ["--temperature", 1.5, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.3]
        flags += ["--seed", 7, "--stop", "z", "--stop", "q", "--max-new-tokens", 50, "--threads", 1]
        told = json.loads(printed("generate", shared_bundle, PROMPT, "--task", "p3", *flags, "--json"))
        assert (told["text"], told["token_ids"]) == (expected.text, list(expected.token_ids))

    @pytest.fixture
    def sampling_bundle(self, bundle, rewrite):
        """A bundle whose model samples by default, from two tokens, and never takes those of an even id."""
        config = {"do_sample": True, "top_k": 2, "temperature": 5.0, "suppress_tokens": list(range(0, 384, 2))}
        rewrite(bundle, "generation_config.json", json.dumps(config).encode())
        return bundle

    def test_the_models_own_defaults_are_the_flags_defaults(self, printed, sampling_bundle):
        engine = prefix_runtime.load(sampling_bundle, threads=1)
        own = engine.generation_defaults().sampling
        for flags, sampling in (
            (["--seed", 3], replace(own, seed=3)),
            (["--seed", 3, "--temperature", 2], replace(own, seed=3, temperature=2.0)),
            (["--temperature", 0], Sampling()),
            (["--temperature", 0, "--repetition-penalty", 3], Sampling(repetition_penalty=3.0)),
        ):
            line = printed("generate", sampling_bundle, PROMPT, "--max-new-tokens", 9, "--json", *flags)
            expected = engine.generate(PROMPT, max_new_tokens=9, sampling=sampling)
            assert json.loads(line)["token_ids"] == list(expected.token_ids)
            assert all(token_id % 2 for token_id in expected.token_ids)

    def test_settings_lie_on_top_of_the_models(self, printed, sampling_bundle, engine):
        flags = ["--set", "do_sample=false", "--set", "suppress_tokens=null", "--set", "no_repeat_ngram_size=1"]
        line = printed("generate", sampling_bundle, PROMPT, "--max-new-tokens", 20, "--json", *flags)
        expected = engine.generate(PROMPT, max_new_tokens=20, generation_config={"no_repeat_ngram_size": 1})
        assert json.loads(line)["token_ids"] == list(expected.token_ids)

    def test_an_end_token_is_an_id_or_a_token(self, printed, engine, tokenizer, shared_bundle):
        free = engine.generate(PROMPT, task="p3", max_new_tokens=20).token_ids
        end = free[3]
        for given in (str(end), tokenizer.id_to_token(end)):
            flags = ["--task", "p3", "--max-new-tokens", 20, "--end-token", "383", "--end-token", given, "--json"]
            told = json.loads(printed("generate", shared_bundle, PROMPT, *flags))
            assert told["token_ids"] == list(free[: free.index(end) + 1])
            assert told["finish_reason"] == "end_token"

    @pytest.mark.parametrize(
        "setting", ["min_new_tokens", "min_new_tokens=", "min_new_tokens=five", "=", "a=" + "[" * 9999]
    )
    def test_a_setting_that_is_no_json_is_a_usage_error(self, cli, shared_bundle, setting):
        result = cli("generate", shared_bundle, PROMPT, "--set", setting)
        assert result.exit_code == 2
        assert "--set: expected NAME=VALUE with a value in JSON, found" in result.stderr

    def test_metrics_go_to_standard_error_when_they_are_asked_for(self, cli, shared_bundle):
        options = [shared_bundle, PROMPT, "--task", "p3", "--max-new-tokens", 4]
        result = cli("generate", *options, "--metrics")
        assert (result.exit_code, result.stdout) == (0, cli("generate", *options).stdout)
        assert "first token " in result.stderr
        assert "prefix 3, prompt " in result.stderr
        assert "4 new tokens (length)" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([PROMPT, "--task", "p4"], "task 'p4': there is none of this name; tasks here: p20, p3"),
            ([PROMPT, "--max-new-tokens", "0"], "max_new_tokens: expected a whole number, 1 or more, found 0"),
            ([PROMPT, "--max-new-tokens", "999"], "expected at most 320 tokens"),
            ([PROMPT, "--temperature", "-1"], "temperature: expected 0 or more, found -1.0"),
            ([PROMPT, "--top-p", "2"], "top_p: expected above 0 and at most 1, found 2.0"),
            (
                [PROMPT, "--end-token", "<|no|>"],
                "token '<|no|>': expected one of the tokenizer's vocabulary, found none",
            ),
            ([PROMPT, "--end-token", "384"], "end_tokens: expected token ids of 0 to 383, found [384]"),
            ([PROMPT, "--set", "max_time=4"], "generation_config: expected some of max_length, "),
            ([PROMPT, "--set", "min_new_tokens=-1"], "min_new_tokens: expected a whole number, 0 or more, found -1"),
            ([PROMPT, "--stop", ""], "stop: expected strings of at least one character"),
            ([PROMPT, "--provider", "tpu"], "provider: expected one of cpu"),
            ([PROMPT, "--threads", "0"], "threads: expected 1 to 512, found 0"),
            ([""], "prompt: expected at least one token, found none"),
            (["--token-ids", "1,x"], "--token-ids: expected whole numbers with commas between, found '1,x'"),
            (["--token-ids", ""], "--token-ids: expected whole numbers"),
            (["--token-ids", "1,384"], "token_ids[1]: expected 0 to 383, found 384"),
            (["a\udcff"], "prompt: expected Unicode text"),
        ],
    )
    def test_what_the_library_refuses_ends_in_one_line(self, refused, shared_bundle, arguments, message):
        assert message in refused("generate", shared_bundle, *arguments)

    def test_an_empty_standard_input_is_refused(self, refused, shared_bundle):
        assert "prompt: expected at least one token" in refused("generate", shared_bundle, input="")

    @pytest.mark.parametrize("given_as", [{}, {"input": ""}])
    def test_an_empty_prompt_is_the_start_token_that_the_tokenizer_adds(self, printed, starting_bundle, given_as):
        expected = prefix_runtime.load(starting_bundle, threads=1).generate(token_ids=[0], max_new_tokens=4).text
        prompt = [] if given_as else [""]
        output = printed("generate", starting_bundle, *prompt, "--max-new-tokens", 4, **given_as)
        assert output == f"{expected}\n"

    def test_a_standard_input_that_is_no_text_is_refused(self, refused, shared_bundle):
        assert "standard input: expected UTF-8 text" in refused("generate", shared_bundle, input=b"\xff\xfe")

    def test_a_missing_bundle_is_refused(self, refused, tmp_path):
        assert f"{tmp_path / 'no'}: expected a bundle" in refused("generate", tmp_path / "no", PROMPT)

    def test_a_bundle_without_tokenizer_prints_token_ids(self, printed, bundle):
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "tokenizer.json"]
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        engine = prefix_runtime.load(bundle, threads=1)
        expected = engine.generate(token_ids=[5, 6], max_new_tokens=4).token_ids
        output = printed("generate", bundle, "--token-ids", "5,6", "--max-new-tokens", 4)
        assert output == ",".join(map(str, expected)) + "\n"


class TestUsage:
    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_help_tells_every_argument(self, printed, command):
        text = printed(*command, "--help")
        assert text.startswith("Usage: ")
        found = main
        for name in command:
            found = found.commands[name]
        names = [p.human_readable_name if isinstance(p, click.Argument) else p.opts[0] for p in found.params]
        for name in [*names, *getattr(found, "commands", ())]:
            assert name in text

    def test_its_version_is_the_packages(self, printed):
        assert prefix_runtime.__version__ in printed("--version")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["nonsense"],
            ["inspect"],
            ["verify"],
            ["tasks", "add", "x"],
            ["tasks", "remove", "x"],
            ["tasks", "nonsense"],
            ["generate"],
            ["generate", "x", "y", "z"],
            ["generate", "x", "y", "--nonsense"],
            ["generate", "x", "y", "--token-ids", "1"],
            ["generate", "x", "y", "--top-k", "many"],
            ["generate", "x", "y", "--max-new-tokens", "1.5"],
        ],
        ids=" ".join,
    )
    def test_a_wrong_use_exits_with_2(self, cli, arguments):
        result = cli(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "Usage: " in result.stderr
        assert "Error: " in result.stderr

    def test_a_bug_keeps_its_traceback(self, cli, shared_bundle, monkeypatch):
        monkeypatch.setattr("prefix_runtime.bundle.folder.Bundle.verify", lambda _: 1 / 0)
        assert isinstance(cli("verify", shared_bundle).exception, ZeroDivisionError)


class TestProcess:
    def test_it_answers_as_a_module(self, shell, engine, shared_bundle):
        run = shell("generate", shared_bundle, PROMPT, "--task", "p3", "--max-new-tokens", 20)
        expected = engine.generate(PROMPT, task="p3", max_new_tokens=20).text
        assert (run.returncode, run.stdout.decode(), run.stderr) == (0, f"{expected}\n", b"")

    def test_an_error_is_one_line_and_exits_with_1(self, shell, bundle):
        (bundle / "model.onnx").write_bytes(b"damaged")
        run = shell("verify", bundle)
        assert (run.returncode, run.stdout) == (1, b"")
        assert run.stderr.startswith(b"Error: ")
        assert run.stderr.count(b"\n") == 1

    def test_a_damaged_graph_is_one_line_too(self, shell, bundle, rewrite):
        rewrite(bundle, "model.onnx", b"damaged")
        run = shell("generate", bundle, PROMPT)
        assert run.returncode == 1
        assert run.stderr.startswith(b"Error: ")
        assert run.stderr.count(b"\n") == 1

    def test_a_wrong_use_exits_with_2(self, shell):
        run = shell("generate")
        assert run.returncode == 2
        assert b"Usage: prefix-runtime generate" in run.stderr

    @pytest.mark.parametrize("arguments", [["a\udcff"], []], ids=["argument", "standard input"])
    def test_bytes_that_are_no_text_are_refused_in_one_line(self, shell, shared_bundle, arguments):
        run = shell("generate", shared_bundle, *arguments, input=b"a\xff")
        assert run.returncode == 1
        assert run.stderr.startswith(b"Error: ")
        assert run.stderr.count(b"\n") == 1

    @pytest.mark.parametrize("arguments", [["generate", "{}", PROMPT, "--json"], ["generate", "{}", PROMPT]])
    def test_a_reader_that_leaves_gets_no_traceback(self, shared_bundle, arguments):
        command = [sys.executable, "-m", "prefix_runtime", *(part.format(shared_bundle) for part in arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            told = process.stderr.read()
        assert told == b""
        assert process.returncode == 1


class TestTerminal:
    """What the environment asks of text; `no-color.org` and `bixense.com/clicolors`."""

    @pytest.fixture
    def headed(self, shared_bundle):
        """The output of a command that prints a bold heading."""

        def run(color, **environment):
            arguments = ["generate", shared_bundle, PROMPT, "--max-new-tokens", 1, "--task", "p3", "--task", "p20"]
            clean = dict.fromkeys(("NO_COLOR", "CLICOLOR", "FORCE_COLOR", "TERM"))
            result = CliRunner().invoke(main, [*map(str, arguments)], color=color, env={**clean, **environment})
            assert result.exit_code == 0
            return result.stdout

        return run

    def test_a_terminal_has_styles_and_a_pipe_has_none(self, headed):
        assert "\x1b[1m── p3" in headed(True)
        assert "\x1b" not in headed(False)

    @pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"CLICOLOR": "0"}, {"TERM": "dumb"}], ids=str)
    def test_who_wants_none_gets_none(self, headed, environment):
        assert "\x1b" not in headed(True, **environment)

    def test_an_empty_no_color_counts_for_nothing(self, headed):
        assert "\x1b[1m" in headed(True, NO_COLOR="")

    def test_styles_may_be_forced_into_a_pipe(self, headed):
        assert "\x1b[1m" in headed(False, FORCE_COLOR="1")
        assert "\x1b" not in headed(False, FORCE_COLOR="1", NO_COLOR="1")

    @pytest.mark.parametrize(
        ("encoding", "heading", "path"),
        [
            ("latin-1", b"-- p3\n", r"größe\u2192.safetensors".encode("latin-1")),
            # click takes such a stream for one that is set up wrongly, and writes UTF-8.
            ("ascii", "── p3\n".encode(), "größe→.safetensors".encode()),
        ],
    )
    def test_a_stream_that_lacks_characters_gets_plain_ones(
        self, shell, shared_bundle, tmp_path, encoding, heading, path
    ):
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"}
        ran = shell(
            "generate", shared_bundle, PROMPT, "--max-new-tokens", 1, "--task", "p3", "--task", "p20", env=environment
        )
        assert (ran.returncode, ran.stderr) == (0, b"")
        assert ran.stdout.startswith(heading)
        odd = shell("inspect", tmp_path / "größe→.safetensors", env=environment)
        assert odd.returncode == 1
        assert path + b": expected a bundle" in odd.stderr

    def test_a_home_folder_is_found_where_no_shell_expands_it(self, shell, shared_bundle, tmp_path):
        (tmp_path / "b").symlink_to(shared_bundle)
        environment = {**os.environ, "HOME": str(tmp_path)}
        assert shell("tasks", "list", "~/b", env=environment).returncode == 0
        ran = shell("tasks", "add", "~/b", "new=~/nothing", env=environment)
        assert f"{tmp_path}/nothing: expected a whole safetensors file".encode() in ran.stderr
