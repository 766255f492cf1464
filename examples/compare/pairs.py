"""Two contestants in turns of a fraction of a second: what one takes over the other where a machine's speed drifts.

    python examples/compare/pairs.py product-int4 llama-q4_0 --model gpt2-medium --pairs 120

`run.py` shows everybody side by side, but its turns are a minute apart where there are many. Here a pair is two short
requests, one behind the other, in changing order, and memory's bandwidth is read just before. Ratios are medians over
pairs with their 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from contestants import CONTESTANTS
from environments import PreparationError
from figures import markdown_table, quartiles, show
from random_model import CONFIGS
from worker import Worker, WorkerError
from workshop import WORK, Order, Workshop

from prefix_runtime.bench.bandwidth import BandwidthProbe
from prefix_runtime.bench.measurements import Ratio, paired_ratio
from prefix_runtime.machine import processor_name

LEAST_PAIRS, LEAST_TOKENS = 6, 2
"""Of which an interval can be had, and a token after the first."""


def measure(workers: Sequence[Worker], probe: BandwidthProbe, pairs: int, request: dict[str, Any]) -> list[Any]:
    """Each pair's two answers and the bandwidth before them; the first pair warms up and is left out."""
    found = []
    for number in range(pairs + 1):
        bandwidth = probe.measure()
        order = workers if number % 2 else workers[::-1]
        answers = {id(worker): worker.ask(**request) for worker in order}
        found.append((*(answers[id(worker)] for worker in workers), bandwidth))
    return found[1:]


def figures(found: Sequence[Any], field: str) -> list[list[float]]:
    """Both contestants' seconds in every pair."""
    return [[pair[index][field] for pair in found] for index in range(2)]


def rows(names: Sequence[str], length: int, found: Sequence[Any]) -> list[Sequence[object]]:
    """Of the table: both contestants' at a prefix length."""
    tokens, firsts = figures(found, "inter_token"), figures(found, "first_token")
    ratios = shown(paired_ratio(*tokens)), shown(paired_ratio(*firsts))
    table: list[Sequence[object]] = []
    for index, name in enumerate(names):
        floors = [(pair[index]["step_bytes"] or 0) / pair[2] for pair in found]
        over_floor = shown(paired_ratio(tokens[index], floors)) if all(floors) else "—"
        milliseconds = [show(quartiles(each[index]), 1e3) for each in (tokens, firsts)]
        over_other = ratios if index == 0 else ("", "")
        table.append((name, length, milliseconds[0], over_other[0], over_floor, milliseconds[1], over_other[1]))
    return table


def shown(ratio: Ratio) -> str:
    """`median [interval]`."""
    interval = "" if ratio.interval is None else " [{:.3f}, {:.3f}]".format(*ratio.interval)
    return f"{ratio.median:.3f}{interval}"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs=2, choices=CONTESTANTS, metavar="PEER", help="as run.py knows them")
    parser.add_argument("--model", choices=CONFIGS, default="gpt2-medium")
    parser.add_argument("--prefix-lengths", type=int, nargs="+", default=[0, 200])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=WORK, help="environments and converted weights are kept there")
    given = parser.parse_args()
    if given.pairs < LEAST_PAIRS or given.new_tokens < LEAST_TOKENS:
        parser.error(f"expected {LEAST_PAIRS} pairs and {LEAST_TOKENS} new tokens or more")
    try:
        table = measured(given)
    except (PreparationError, WorkerError) as error:
        sys.exit(str(error))
    print(f"`python examples/compare/pairs.py {' '.join(sys.argv[1:])}`, {processor_name()}, {given.threads} threads")
    print()
    header = ("", "prefix", "ms a token", "/ the other", "/ its floor", "ms to the first", "/ the other")
    print("\n".join(markdown_table(header, table)))


def measured(given: argparse.Namespace) -> list[Sequence[object]]:
    """The table's rows."""
    longest = max(given.prefix_lengths) + given.prompt_length + given.new_tokens
    shop = Workshop(Order(given.model, given.prefix_lengths, longest, given.threads, given.folder, {}))
    prompt = np.random.default_rng(0).integers(CONFIGS[given.model].vocab_size, size=given.prompt_length).tolist()
    commands = [CONTESTANTS[name].command(shop) for name in given.names]
    table: list[Sequence[object]] = []
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(command, shop.logs / f"pairs-{place}.log"))
            for place, command in enumerate(commands)
        ]
        probe = BandwidthProbe(given.threads)
        for length in given.prefix_lengths:
            request = {"prefix_length": length, "prompt": prompt, "new_tokens": given.new_tokens}
            table += rows(given.names, length, measure(workers, probe, given.pairs, request))
    return table


if __name__ == "__main__":
    main()
