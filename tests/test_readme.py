"""The README's commands and its Python, run word for word in an empty folder that has nothing but `examples`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SCRIPTS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def outputs(folder):
    """What each command printed, run in the README's order."""
    environment = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    found = {}
    for command in COMMANDS:
        done = subprocess.run(
            shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        found[command] = done.stdout + done.stderr
    return found


def test_there_are_commands_and_python_to_run():
    assert len(COMMANDS) >= 6
    assert len(PYTHON) == 1


def test_build_prints_the_comparison_of_each_task(outputs):
    table = outputs[COMMANDS[0]]
    assert all(word in table for word in ("headline", "json", "peft", "equal"))


def test_the_tasks_are_listed(outputs):
    listing = next(output for command, output in outputs.items() if "tasks list" in command)
    assert [line.split("\t")[0] for line in listing.splitlines()] == ["describe", "headline", "json"]


def test_metrics_are_printed(outputs):
    output = next(output for command, output in outputs.items() if "--metrics" in command)
    assert re.search(r"first token [0-9.]+ ms, then [0-9.]+ ms a token", output)


@pytest.mark.usefixtures("outputs")
def test_the_python_runs(folder):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PYTHON[0]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("('describe', 'headline', 'json')")


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(link):
    if link.startswith("#"):
        assert link[1:] in [title.lower().replace(" ", "-") for title in re.findall(r"(?m)^#+ (.+)$", README)]
    else:
        assert (ROOT / link).exists()


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
