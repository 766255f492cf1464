"""What all tests start from: models, adapters and bundles of the workshop, each made once."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from .workshop import Workshop

SEED = int(os.environ.get("PREFIX_EXPORT_SEED") or datetime.now(UTC).strftime("%Y%m%d"))
"""Of tests that read random input: another each day. The environment variable sets it."""

WORKSHOP = os.environ.get("PREFIX_EXPORT_WORKSHOP")
"""A folder that keeps what the workshop makes; otherwise it is the tests' own, and new each time."""


def pytest_configure():
    with suppress(ModuleNotFoundError):  # the runtime's tests run without it too
        import torch

        # Two workers on two cores: more threads would only get into each other's way.
        torch.set_num_threads(1)


def pytest_report_header():
    return f"seed of random input: PREFIX_EXPORT_SEED={SEED}"


@pytest.fixture(autouse=True)
def no_width(monkeypatch):
    """Tables are as wide as they are, whatever the width that the tests' own terminal exports."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    base = tmp_path_factory.getbasetemp()
    own = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workshop"
    root = Path(WORKSHOP) if WORKSHOP else own
    root.mkdir(parents=True, exist_ok=True)
    return Workshop(root)


@pytest.fixture(scope="session")
def shared_bundle(workshop) -> Path:
    """A GPT-2 bundle with a tokenizer and the tasks `p3` and `p20`; not to be changed."""
    return workshop.bundle()


@pytest.fixture
def bundle(shared_bundle, tmp_path) -> Path:
    """A copy of the shared bundle, to be changed and broken."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))
