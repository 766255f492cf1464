"""What it costs to bake prefixes into a graph, beside feeding them: all graphs of one model, interleaved in one run.

    python examples/compare/baking.py [--model gpt2-medium] [--lengths 10 50 200] [--rounds 5]

Builds bundles of random weights and random adapters: prefixes fed to the fast flavour and to the portable one, baked as
a bank of all lengths, and baked alone. Prints, by graph and prefix length, `bench`'s median latencies in milliseconds
with their quartiles, and the ratio to the same prefix fed to the fast flavour, taken within a round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from figures import markdown_table, quartiles, show
from random_model import CONFIGS, save_random_adapter, save_random_model
from transformers import AutoModelForCausalLM

from prefix_export.build import BuildRequest, build
from prefix_runtime.bench.measurements import BenchReport, Cell
from prefix_runtime.bench.request import BenchRequest
from prefix_runtime.bench.run import bench_together
from prefix_runtime.machine import processor_name

FIGURES = ("inter_token_latency", "time_to_first_token")


def bundles(model: str, lengths: list[int], folder: Path) -> dict[str, Path]:
    """The bundles, by what they are called in the table; what all are compared with comes first."""
    source = folder / "model"
    save_random_model(model, source)
    base = AutoModelForCausalLM.from_pretrained(source)
    adapters = {f"p{length:03}": folder / f"adapter-{length}" for length in lengths}
    for length, adapter in zip(lengths, adapters.values(), strict=True):
        save_random_adapter(base, length, adapter)
    del base
    wanted = {
        "fed, fast": (adapters, {}),
        "fed, portable": (adapters, {"target": "portable"}),
        f"baked, a bank of {len(adapters)}": (adapters, {"mode": "bake"}),
        **{
            f"baked alone, {name}": ({name: adapters[name]}, {"mode": "bake"})
            for name in (min(adapters), max(adapters))
        },
    }
    made = {}
    for number, (name, (prefixes, options)) in enumerate(wanted.items()):
        print(f"building: {name}", file=sys.stderr)
        made[name] = folder / f"bundle-{number}"
        build(BuildRequest(str(source), prefixes, made[name], verify=False, **options))  # type: ignore[arg-type]
    return made


def table(reports: dict[str, BenchReport], figure: str) -> list[str]:
    """The lines of one figure's table."""
    fast = {(cell.prefix_length, cell.task): cell for cell in next(iter(reports.values())).cells}
    rows = [
        (name, cell.prefix_length, *_figures(cell, fast[cell.prefix_length, cell.task], figure))
        for name, report in reports.items()
        for cell in sorted(report.cells, key=lambda each: each.prefix_length)
    ]
    return markdown_table(("graph", "prefix", "ms", "/ fed, fast"), rows)


def _figures(cell: Cell, other: Cell, figure: str) -> tuple[str, str]:
    own = cell.figure(figure)
    ratios = [left / right for left, right in zip(own, other.figure(figure), strict=True)]
    return show(quartiles(own), 1e3), show(quartiles(ratios))


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="gpt2-medium")
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    request = BenchRequest(
        prefix_lengths=(0,), rounds=arguments.rounds, new_tokens=arguments.new_tokens, threads=arguments.threads
    )
    with tempfile.TemporaryDirectory() as folder:
        made = bundles(arguments.model, arguments.lengths, Path(folder))
        found = bench_together(list(made.values()), request, lambda done, total, text: print(text, file=sys.stderr))
    reports = dict(zip(made, found, strict=True))
    print(
        f"`python examples/compare/baking.py {' '.join(sys.argv[1:])}`: {processor_name()}, {arguments.threads} threads"
    )
    for figure in FIGURES:
        print("\n".join(["", f"{figure.replace('_', ' ')}:", "", *table(reports, figure)]))


if __name__ == "__main__":
    main()
