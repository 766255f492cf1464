"""Reads a million checkpoints with changed bytes and reports what happened.

    python tests/campaigns/hostile_files.py --mutations 1000000 --seed 1 --report build/hostile.json

Every file must be read or refused by a typed error. The report counts both, and has the longest reading in seconds and
the memory that the process grew by, for each family and each way that tensors are stored. The script stops with a
traceback at the first other error; the seed makes it happen again.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from prefix_runtime.machine import peak_memory

sys.path.append(str(Path(__file__).parents[2]))

from tests.export.mutations import FILES, read_mutations


@dataclass(frozen=True)
class Outcome:
    """What reading one kind of file did."""

    family: str
    stored: str
    read: int
    refused: int
    longest_seconds: float
    grown_bytes: int


def outcome(name: str, how: str, count: int, seed: int) -> Outcome:
    """Reads so many files of a family."""
    read, longest, before, since = 0, 0.0, peak_memory(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for was_read in read_mutations(Path(folder), name, how, count, seed):
            now = time.perf_counter()
            read, longest, since = read + was_read, max(longest, now - since), now
    return Outcome(name, how, read, count - read, round(longest, 3), peak_memory() - before)


@click.command()
@click.option("--mutations", default=1_000_000, show_default=True, help="Files to read, all families together.")
@click.option("--seed", default=0, show_default=True, help="Seed of the changed bytes.")
@click.option("--report", type=click.Path(path_type=Path), help="JSON file to write.")
def main(mutations: int, seed: int, report: Path | None) -> None:
    """Read spoilt checkpoints and report what happened."""
    outcomes = []
    for name, how in FILES:
        outcomes.append(outcome(name, how, mutations // len(FILES), seed))
        click.echo(outcomes[-1])
    if report is not None:
        content = {"mutations": mutations, "seed": seed, "outcomes": [asdict(each) for each in outcomes]}
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
