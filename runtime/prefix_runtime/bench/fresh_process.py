"""Measure time and memory of a fresh process that opens a bundle and runs one row."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from prefix_runtime.errors import BenchError
from prefix_runtime.generation.arguments import GenerationOptions
from prefix_runtime.generation.generation_config import PLAIN
from prefix_runtime.machine import peak_memory, resident_memory

from .inputs import free_name, random_prefix, random_prompts
from .measurements import Opening
from .plan import BenchRow
from .request import BenchRequest

# Not with the interpreter's -m, so that the child can time the import itself.
_CHILD = """
import sys, time
started = time.perf_counter()
import prefix_runtime
seconds = time.perf_counter() - started
from prefix_runtime.bench.fresh_process import observe
sys.stdout.write(observe(seconds, *sys.argv[1:]))
"""


def run_in_fresh_process(path: Path, row: BenchRow, request: BenchRequest) -> Opening:
    """The measurements of a fresh interpreter that opens a bundle and runs one row.

    Raises:
        BenchError: the process failed; the message gives its reason.
    """
    settings = asdict(row) | {key: getattr(request, key) for key in ("provider", "threads", "new_tokens")}
    command = [sys.executable, "-c", _CHILD, str(path), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # this interpreter
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        reason = last.partition("Error: ")[2] or last  # a traceback's last line begins with the error's class
        raise BenchError(f"{path}: expected a fresh process to run {row}, found {reason}")
    return Opening(**asdict(row), **json.loads(done.stdout))


def observe(import_seconds: float, path: str, settings: str) -> str:
    """Open a bundle in this process, run a row, and return the measurements of an `Opening` as JSON."""
    from prefix_runtime.engine import load

    request = json.loads(settings)
    provider, threads, new_tokens = (request.pop(key) for key in ("provider", "threads", "new_tokens"))
    row = BenchRow(**request)
    started = time.perf_counter()
    engine = load(path, provider=provider, threads=threads, max_batch=row.batch_size, prepare=False)
    open_seconds = time.perf_counter() - started
    opened_bytes = resident_memory()
    task = row.task
    if task is None and row.prefix_length:
        task = free_name("random", engine.tasks)
        engine.add_task(task, random_prefix(engine.bundle, row.prefix_length))
    prompts = random_prompts(engine.bundle, row)
    options: GenerationOptions = {"max_new_tokens": new_tokens, "ignore_end": True, "generation_config": PLAIN}
    engine.generate(token_ids=prompts, task=task, **options)
    measured = {
        "import_seconds": import_seconds,
        "open_seconds": open_seconds,
        "opened_bytes": opened_bytes,
        "generated_bytes": peak_memory(),
        "resident_bytes": resident_memory(),
    }
    return json.dumps(measured)
