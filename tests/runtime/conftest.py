"""A shared engine, prefixes that fit it, and a way to break what the manifest would notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import prefix_runtime
from prefix_runtime import LayerPrefix, Prefix
from prefix_runtime.backends.onnxruntime import session
from prefix_runtime.bench.measurements import BenchReport, Cell, Opening, Sample, Subject, Switch
from prefix_runtime.bench.request import BenchRequest
from prefix_runtime.bundle.folder import MANIFEST_NAME, describe_file


@pytest.fixture(scope="session")
def engine(shared_bundle):
    """An engine on the shared bundle, to which no test adds tasks."""
    return prefix_runtime.load(shared_bundle, threads=1)


@pytest.fixture(scope="session")
def tokenizer(shared_bundle):
    return Tokenizer.from_file(str(shared_bundle / "tokenizer.json"))


@pytest.fixture(scope="session")
def make_prefix():
    """Random prefixes, of the shared bundle's geometry where nothing else is asked for."""

    def make(length=4, *, layers=3, heads=4, head_dim=16, dtype=np.float32, seed=0, **fields):
        shape = (2, layers, heads, length, head_dim)
        pairs = zip(*np.random.default_rng(seed).normal(size=shape).astype(dtype), strict=True)
        return Prefix({"decoder": tuple(LayerPrefix(*pair) for pair in pairs)}, **{"position_base": length} | fields)

    return make


@pytest.fixture(scope="session")
def rewrite():
    """Gives a file of a bundle other content, and the manifest its size and hash."""

    def rewrite_file(bundle, name, content):
        (bundle / name).write_bytes(content)
        entry = describe_file(bundle, name)
        manifest = json.loads((bundle / MANIFEST_NAME).read_text())
        for listed in [*manifest["files"], *(task["file"] for task in manifest["tasks"].values())]:
            if listed["path"] == name:
                listed.update(size=entry.size, sha256=entry.sha256)
        (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))

    return rewrite_file


@pytest.fixture
def starting_bundle(bundle, rewrite):
    """A copy of the shared bundle whose tokenizer puts the start token `<|end|>`, id 0, before every text."""
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    rewrite(bundle, "tokenizer.json", tokenizer.to_str().encode())
    return bundle


@pytest.fixture(scope="session")
def python():
    """Runs code in a clean interpreter with these arguments."""

    def run(code, *arguments, **options):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)

    return run


@pytest.fixture
def no_hang():
    """A context that fails where it would wait for ever."""

    @contextmanager
    def limited():
        def fail(*_):
            pytest.fail("still waiting after 30 seconds")

        before = signal.signal(signal.SIGALRM, fail)
        signal.alarm(30)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    return limited()


@pytest.fixture
def as_nobody():
    """A context without root's rights, for which permissions do not count."""

    @contextmanager
    def nobody():
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)

    return nobody


def sample(latency):
    """A bench's sample of this inter-token latency, its other figures in proportion."""
    return Sample(latency / 10, 2 * latency, 1.5 * latency, latency, 1 / latency)


def cell(length, *latencies, task=None, prompt=10, batch=1):
    """A row with a sample for each of these inter-token latencies."""
    return Cell(task, length, prompt, batch, tuple(map(sample, latencies)))


def report_of(*cells, rounds=None, new_tokens=8):
    """A report of these rows, measured on a machine that reads 1 GB a second."""
    rounds = rounds or len(cells[0].samples)
    return BenchReport(
        command="prefix-runtime bench bundle",
        created="2030-01-02T03:04:05+00:00",
        versions={"python": "3.11.0"},
        machine={"processor": "A processor", "processors": "4 processors", "system": "Linux x86_64"},
        subject=Subject("bundle", "a-model", "fp32", "fp32", weight_bytes=1_000_000, values_per_position=100),
        request=BenchRequest(rounds=rounds, new_tokens=new_tokens),
        bandwidth=(1e9,) * rounds,
        cells=cells,
        switches=(Switch(None, 5, (0.002,) * rounds, (0.0001,) * rounds),),
        openings=(Opening(*cells[0].key, 0.1, 1.5, 10_000_000, 20_000_000, None),),
        skipped=("prefix 9: leaves no room",),
    )


@pytest.fixture
def opened_paths(monkeypatch):
    """The graphs that sessions are opened on, in order."""
    paths, init = [], session.Session.__init__

    def note(self, path, *arguments):
        paths.append(path)
        init(self, path, *arguments)

    monkeypatch.setattr(session.Session, "__init__", note)
    return paths
