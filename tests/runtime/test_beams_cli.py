"""`generate` with beams on the command line: the texts of the library, not streamed, several with their scores."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import prefix_runtime
from prefix_runtime.cli.main import main

PROMPT = "the lazy dog"
FLAGS = ["--task", "p3", "--max-new-tokens", "9", "--threads", "1"]
ASKED = {"task": "p3", "max_new_tokens": 9}


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, ["generate", *map(str, arguments)])


def test_the_best_text_is_printed(run, engine, shared_bundle):
    result = run(shared_bundle, PROMPT, *FLAGS, "--num-beams", 3)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == engine.generate(PROMPT, **ASKED, num_beams=3).text + "\n"


def test_several_texts_have_titles_with_their_scores(run, engine, shared_bundle):
    result = run(shared_bundle, PROMPT, *FLAGS, "--num-beams", 3, "--num-return-sequences", 2, "--length-penalty", 2)
    best = engine.generate(PROMPT, **ASKED, num_beams=3, num_return_sequences=2, length_penalty=2.0).sequences
    lines = [f"── {place} of 2, score {each.score:.4f}\n{each.text}\n" for place, each in enumerate(best, 1)]
    assert result.stdout == "".join(lines)


def test_several_tasks_too(run, shared_bundle):
    flags = [*FLAGS, "--task", "p20", "--num-beams", 2, "--num-return-sequences", 2]
    titles = [line for line in run(shared_bundle, PROMPT, *flags).stdout.splitlines() if line.startswith("── ")]
    assert [title.split(", score")[0] for title in titles] == [
        f"── {task}, {place} of 2" for task in ("p3", "p20") for place in (1, 2)
    ]


def test_json_has_all_of_them(run, engine, shared_bundle):
    flags = [*FLAGS, "--num-beams", 3, "--num-return-sequences", 3, "--json"]
    told = json.loads(run(shared_bundle, PROMPT, *flags).stdout)
    best = engine.generate(PROMPT, **ASKED, num_beams=3, num_return_sequences=3)
    assert told["score"] == pytest.approx(best.score)
    assert [each["token_ids"] for each in told["sequences"]] == [list(each.token_ids) for each in best.sequences]
    assert told["text"] == told["sequences"][0]["text"] == best.text
    assert "sequences" not in json.loads(run(shared_bundle, PROMPT, *FLAGS, "--json").stdout)


def test_the_models_own_beams_are_searched(run, bundle, rewrite):
    rewrite(bundle, "generation_config.json", b'{"num_beams": 3, "num_return_sequences": 2}')
    own = prefix_runtime.load(bundle, threads=1)
    assert run(bundle, PROMPT, *FLAGS).stdout.count("── ") == 2
    streamed = "".join(chunk.text for chunk in own.stream(PROMPT, **ASKED, num_beams=1))
    assert run(bundle, PROMPT, *FLAGS, "--num-beams", 1).stdout == streamed + "\n"
    sampled = run(bundle, PROMPT, *FLAGS, "--temperature", 1)
    assert (sampled.exit_code, "── " in sampled.stdout) == (0, False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-beams", 0], "num_beams: expected a whole number, 1 to 1024, found 0"),
        (
            ["--num-beams", 2, "--temperature", 1],
            "num_beams: expected 1 with sampling, found 2; for a beam search pass",
        ),
        (["--num-return-sequences", 2], "num_return_sequences: expected at most num_beams, 1, found 2"),
        (["--num-beams", 2, "--length-penalty", 99], "length_penalty: expected a number, -50 to 50, found 99.0"),
        (["--set", "early_stopping=1", "--num-beams", 2], 'early_stopping: expected true, false or "never", found 1'),
    ],
    ids=str,
)
def test_what_makes_no_sense_ends_in_one_line(run, shared_bundle, flags, message):
    result = run(shared_bundle, PROMPT, *FLAGS, *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1
