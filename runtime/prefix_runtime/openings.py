"""What it takes a fresh process to open a bundle: time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from .bundle import Bundle
from .errors import BenchError
from .machine import peak_memory, resident_memory
from .measurements import Opening

# The module is imported here, and not by the interpreter's -m, so that its own import can be timed.
_CHILD = """
import sys, time
started = time.perf_counter()
import prefix_runtime
seconds = time.perf_counter() - started
from prefix_runtime.openings import observe
sys.stdout.write(observe(seconds, *sys.argv[1:]))
"""


def open_in_fresh_process(path: Path, provider: str, threads: int | None) -> Opening:
    """What a fresh interpreter measures that opens a bundle and generates a token.

    Raises:
        BenchError: it fails.
    """
    command = [sys.executable, "-c", _CHILD, str(path), provider, str(threads or "")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # this interpreter
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        reason = last.partition("Error: ")[2] or last  # a traceback's last line begins with the error's class
        raise BenchError(f"{path}: expected a fresh process to open the bundle, found {reason}")
    return Opening(**json.loads(done.stdout))


def least_task(bundle: Bundle) -> str | None:
    """What to run a bundle under that needs least: nothing, or where its graph holds prefixes the shortest."""
    if bundle.manifest.mode == "feed":
        return None
    return min(bundle.tasks, key=lambda task: bundle.manifest.tasks[task].prefix_length)


def observe(import_seconds: float, path: str, provider: str, threads: str) -> str:
    """Open a bundle in this process, generate a token, and return an `Opening` as JSON."""
    from .engine import load

    started = time.perf_counter()
    engine = load(path, provider=provider, threads=int(threads) if threads else None)
    open_seconds = time.perf_counter() - started
    opened_bytes = peak_memory()
    engine.generate(token_ids=[0], task=least_task(engine.bundle), max_new_tokens=1, ignore_end=True)
    measured = {
        "import_seconds": import_seconds,
        "open_seconds": open_seconds,
        "opened_bytes": opened_bytes,
        "generated_bytes": peak_memory(),
        "resident_bytes": resident_memory(),
    }
    return json.dumps(measured)
