"""Every write, name, sync and map of what changes files fails in turn: the old state is left, or the new one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prefix_runtime import Bundle

pytestmark = pytest.mark.stress

HERE = Path(__file__).parent
WAYS = {"ENOSPC", "EIO", "EACCES", "kill"}


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """The faulty file layer, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed (Debian: apt-get install gcc)"
    path = tmp_path_factory.mktemp("layer") / "faulty_files.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", path, HERE / "faulty_files.c", "-ldl"]
    subprocess.run(list(map(str, command)), check=True)
    return path


@pytest.fixture
def sources(workshop, shared_bundle, tmp_path):
    """What each operation begins with."""
    model = workshop.model("gpt2", tokenizer=True)
    prefix = tmp_path / "new.safetensors"
    Bundle.open(shared_bundle).prefix("p3").save(prefix)
    return {
        "add": [shared_bundle, prefix],
        "remove": [shared_bundle, prefix],
        "prepare": [shared_bundle],
        "build": [model, workshop.adapter(model, 3)],
    }


# At least so many points: a layer that sees nothing would find nothing wrong.
@pytest.mark.parametrize(("operation", "least"), [("add", 8), ("remove", 5), ("prepare", 10), ("build", 40)])
def test_a_fault_at_any_point_leaves_the_old_state_or_the_new(layer, sources, tmp_path, report, operation, least):
    folder = tmp_path / "faulty"
    folder.mkdir()
    command = [sys.executable, HERE / "file_faults.py", operation, folder, *sources[operation]]
    run = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"LD_PRELOAD": str(layer), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads(run.stdout.splitlines()[-1])
    report(told)
    assert told.keys() == WAYS
    for counts in told.values():
        assert counts["what"] == [], run.stderr[-2000:]
        assert counts["points"] >= least
        assert counts["new"] >= 1
        assert counts["old"] >= 1
