"""How long a stress test takes, and where it says what it counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.runtime.conftest import make_prefix  # noqa: F401  # a fixture

SECONDS = float(os.environ.get("STRESS_SECONDS", "300"))
"""Of all tests that go on as long as they are told."""


@pytest.fixture
def report(request, capsys):
    """Prints counts, and appends them to the file that STRESS_REPORT names."""

    def tell(counts):
        line = json.dumps({"test": request.node.name, **counts})
        with capsys.disabled():
            print(f"\n{line}", flush=True)  # noqa: T201  # the counts are what a run is for
        if path := os.environ.get("STRESS_REPORT"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    return tell
