"""The commands and the Python of the README and of every page, run word for word.

Each page runs in a folder of its own that has nothing but `examples` and, unless the page builds it, the bundle that
"Getting started" leaves. CONTRIBUTING.md says how blocks are written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "runtime" / "README.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    ROOT / ".github" / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
START = "docs/getting-started.md"

# All that is not run: by page, the reason of each block.
NOT_RUN = {
    "README.md": ["network"],
    "runtime/README.md": ["network"],
    START: ["network", "network"],
    "docs/guides/base-models.md": ["model"],
    "docs/guides/gpu.md": ["gpu", "gpu"],
    "docs/guides/tensorrt.md": ["tensorrt"],
    "examples/compare/README.md": ["minutes"],
    "examples/demo/README.md": ["minutes"],
    "examples/real/README.md": ["model", "model"],
    "examples/web/README.md": ["npm"],
}
# What excuses a block of each reason: every one of its lines, or the program, matches.
EXCUSES = {
    "network": r"pip install ",
    "gpu": r"pip install .*\[gpu\]|.*provider=\"cuda\"",
    "tensorrt": r"prefix-export tensorrt ",
    "npm": r"npm |node |prefix-export build .*--target web",
    "model": r"pip install .*\[gguf\]|.*SmolLM2|\.venv/bin/python examples/real/|.*build/real",
    "minutes": r"python examples/(compare|demo)/\w+\.py",
}
RUN_LANGUAGES = ("console", "python")
SHOWN_LANGUAGES = ("text",)


class Block(NamedTuple):
    """A fenced block: its language, its text, and why it is not run."""

    language: str
    text: str
    reason: str | None

    @property
    def commands(self):
        return [line.removeprefix("$ ") for line in self.text.splitlines()] if self.language == "console" else []


def blocks(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.findall(r"(?m)(?:^<!-- not run: (\w+) -->\n)?^```(\S*)\n((?:.*\n)*?)```$", text)
    return [Block(language, content, reason or None) for reason, language, content in found]


def runs(name, language):
    return [block for block in blocks(name) if block.language == language and block.reason is None]


RUNNABLE = [name for name in NAMES if runs(name, "console") or runs(name, "python")]


class Runner:
    """Runs commands in forks of one process that has imported torch, and keeps what identical builds made."""

    def __init__(self, folder):
        self.folder = folder
        self.built = {}
        self.process = None

    def command(self, command, folder):
        """What the command printed; it must succeed."""
        argv = shlex.split(command)
        output = Path(argv[argv.index("--output") + 1] if "--output" in argv else "bundle")
        if (kept := self.built.get(command)) is not None:
            made, printed = kept
            shutil.copytree(made, folder / output)
            return printed
        printed = self.fork(argv, folder)
        if argv[:2] == ["prefix-export", "build"]:
            made = self.folder / f"built-{len(self.built)}"
            shutil.copytree(folder / output, made)
            self.built[command] = made, printed
        return printed

    def fork(self, argv, folder):
        """What a command, or a Python program, printed in a fork."""
        if self.process is None:
            script = [sys.executable, str(ROOT / "tests" / "forked_commands.py")]
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
            self.process = subprocess.Popen(
                script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=self.folder
            )
        output = self.folder / "printed.txt"
        self.process.stdin.write(json.dumps({"folder": str(folder), "argv": argv, "output": str(output)}) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        printed = output.read_text(encoding="utf-8")
        assert code == "0", f"{shlex.join(argv)}\n{printed}"
        return printed

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(timeout=60)
            self.process.stdout.close()


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("pages"))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def printed(runner):
    """By page, on demand: its folder, and what each of its commands printed, run in the page's order."""
    done = {}

    def page(name):
        if name not in done:
            folder = runner.folder / str(len(done))
            folder.mkdir()
            (folder / "examples").symlink_to(ROOT / "examples")
            commands = [command for block in runs(name, "console") for command in block.commands]
            done[name] = folder, {}
            if not any("prefix-export build" in command and "--output" not in command for command in commands):
                started, _ = page(START)
                shutil.copytree(started / "bundle", folder / "bundle")
            for command in commands:
                done[name][1][command] = runner.command(command, folder)
        return done[name]

    return page


@pytest.mark.parametrize("name", [name for name in RUNNABLE if runs(name, "console")])
def test_the_commands_of_a_page_run(name, printed):
    _, outputs = printed(name)
    assert outputs


@pytest.mark.parametrize("name", [name for name in RUNNABLE if runs(name, "python")])
def test_the_python_of_a_page_runs(name, printed, runner):
    folder, _ = printed(name)
    program = "\n".join(block.text for block in runs(name, "python"))
    if "prefix_export" in program:
        runner.fork(["python", program], folder)
        return
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_build_prints_the_comparison_of_each_task(printed):
    table = next(output for command, output in printed(START)[1].items() if "build" in command)
    assert all(word in table for word in ("headline", "json", "peft", "equal"))


def test_the_tasks_are_listed(printed):
    listing = next(output for command, output in printed(START)[1].items() if "tasks list" in command)
    assert [line.split("\t")[0] for line in listing.splitlines()] == ["describe", "headline", "json"]


def test_metrics_are_printed(printed):
    output = next(o for command, o in printed("docs/guides/measuring.md")[1].items() if "--metrics" in command)
    assert re.search(r"first token [0-9.]+ ms, then [0-9.]+ ms a token", output)


@pytest.mark.parametrize("name", NAMES)
def test_each_block_is_run_or_says_why_not(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = blocks(name)
    fences = len(re.findall(r"(?m)^```", text))
    assert fences == 2 * len(found), "a fence that the test does not read"
    for block in found:
        assert block.language in RUN_LANGUAGES + SHOWN_LANGUAGES
        if block.language == "console":
            assert all(line.startswith("$ ") for line in block.text.splitlines())
    assert [block.reason for block in found if block.reason] == NOT_RUN.get(name, [])
    assert len(re.findall(r"(?m)^<!-- not run", text)) == len(NOT_RUN.get(name, []))


@pytest.mark.parametrize("name", NOT_RUN)
def test_a_block_that_is_not_run_has_what_excuses_it(name):
    for block in blocks(name):
        if block.reason == "gpu" and block.language == "python":
            assert re.search(EXCUSES["gpu"], block.text)
        elif block.reason in ("network", "tensorrt", "npm", "minutes"):
            assert all(re.match(EXCUSES[block.reason], command) for command in block.commands)
        elif block.reason is not None:
            assert any(re.match(EXCUSES[block.reason], command) for command in block.commands)


@pytest.mark.parametrize("name", NAMES)
def test_no_code_is_indented(name):
    """Such a block has no language, so that nothing would say whether it runs."""
    text = re.sub(r"(?ms)^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"))
    lists = re.sub(r"(?m)^( *)([-*]|\d+\.) .*\n(?:(?:\1 +.*)?\n)*", "", text)
    options = re.sub(r"(?m)^::: .*\n(?: +.*\n)*", "", lists)
    assert not re.findall(r"(?m)^\n {4}\S.*$", options)


def heading_anchors(path):
    titles = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"(?ms)^```.*?^```$|`[^`\n]+`(?!\])", "", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in heading_anchors(target), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = "\n".join(block.text for name in ("README.md", START) for block in blocks(name))
    targets = re.findall(r"(?m)^make ([\w-]+)", text)
    assert set(targets) >= {"demo", "test"}
    for target in targets:
        assert f"\n{target}:" in makefile


def test_no_folder_of_the_documentation_has_more_than_15_pages():
    folders = {page.parent for page in (ROOT / "docs").rglob("*")}
    assert all(len(list(folder.iterdir())) <= 15 for folder in folders)


def test_the_tables_of_performance_are_those_of_the_reports():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "figures.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", ["prefix_runtime", "prefix_export"])
def test_the_page_of_errors_shows_the_whole_tree(package):
    said = (import_module(f"{package}.errors").__doc__ or "").replace("`", "")
    trees = [block.text for block in blocks("docs/reference/errors.md")]
    assert sum(tree in said for tree in trees) == 1


def test_the_page_of_environment_variables_names_those_that_are_read():
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    sources = [*(ROOT / "prefix_export").rglob("*.py"), *(ROOT / "runtime" / "prefix_runtime").rglob("*.py")]
    read = "".join(source.read_text(encoding="utf-8") for source in sources)
    names = set(re.findall(r"environ(?:\.get\(|\.setdefault\(|\[)\"(\w+)\"", read))
    assert len(names) >= 8
    assert not [name for name in names if f"`{name}" not in page]


def test_the_workflow_runs_the_steps_of_ci():
    steps = re.findall(r"(?m)^make .+$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^\s+- run: (make .+)$", workflow) == steps
