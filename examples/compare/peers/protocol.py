"""How a peer is asked and answers: JSON, a line each way, on standard input and output.

Once it is open it says `{"open_seconds", "resident_bytes", "versions"}`. Asked `{"prefix_length", "prompt",
"new_tokens"}` it answers `{"tokens", "first_token", "inter_token", "step_bytes", "resident_bytes"}`, in seconds,
`inter_token` the median, `step_bytes` what that step has to read of memory, or null. A request may name another of the
peer's methods as `"call"`. Imports nothing but the standard library, because every environment runs it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TextIO


@dataclass
class Generation:
    """Greedy tokens, and the seconds that each of them took; the first's counted from the request.

    `step_bytes` are the weights, keys and values that the step in their middle reads, where the peer knows.
    """

    tokens: list[int]
    seconds: list[float]
    step_bytes: float | None = None


def greedy(step: Callable[[list[int]], int], prompt: Sequence[int], new_tokens: int) -> Generation:
    """Feed the prompt to a step, then each token that it returns."""
    fed, answer = list(prompt), Generation([], [])
    for _ in range(new_tokens):
        started = time.perf_counter()
        fed = [step(fed)]
        answer.seconds.append(time.perf_counter() - started)
        answer.tokens += fed
    return answer


def stand_in(length: int) -> list[int]:
    """The text prompt that stands in for a prefix of this length where there is no notion of one."""
    return [5 + position % 256 for position in range(length)]


def serve(open_peer: Callable[[], Any], *packages: str) -> None:
    """Open a peer, say so with the versions of these packages, and answer until standard input ends."""
    answers = _claim_standard_output()
    started = time.perf_counter()
    peer = open_peer()
    opened = {"open_seconds": time.perf_counter() - started, "versions": {name: version(name) for name in packages}}
    print(json.dumps(opened | {"resident_bytes": resident_bytes()}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(peer, request.pop("call", "generate"))(**request)
        summary = _summary(answer) if isinstance(answer, Generation) else answer
        print(json.dumps(summary | {"resident_bytes": resident_bytes()}), file=answers, flush=True)


def resident_bytes() -> int:
    """Memory of this process, the mapped pages of files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _summary(generation: Generation) -> dict[str, Any]:
    first, *later = generation.seconds
    return {
        "tokens": generation.tokens,
        "first_token": first,
        "inter_token": median(later),
        "step_bytes": generation.step_bytes,
    }


def _claim_standard_output() -> TextIO:
    """Standard output for the answers alone: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers
