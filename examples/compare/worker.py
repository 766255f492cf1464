"""A peer in a process of its own, asked and answering as `peers/protocol.py` says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from environments import last_line

SHOWN_REASON = 300


class WorkerError(Exception):
    """A worker ended before it answered; the message is the last line that it printed."""


class Worker:
    """A peer in a process of its own, idle while others run."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        try:
            self.opened = self._read()
        except WorkerError:
            self.close()
            raise

    def ask(self, **request: Any) -> Any:
        """Its answer.

        Raises:
            WorkerError
        """
        assert self._process.stdin
        with suppress(BrokenPipeError):  # reading says why
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise WorkerError((last_line(self._log) or f"ended with code {code}")[:SHOWN_REASON])
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
