"""The product against its peers, on the same weights, prefix and prompt, interleaved in one run.

    python examples/compare/run.py --model gpt2-medium --prefix-lengths 0 200

Prints a table as Markdown; --output also writes it, beside the same as JSON. `README.md` says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from contest import Contest
from contestants import CONTESTANTS, REFERENCE
from environments import ENVIRONMENTS, PreparationError
from figures import PASSES, quartiles
from random_model import CONFIGS
from report import contestants_report, to_markdown
from worker import Worker
from workshop import WORK, Order, Workshop

from prefix_runtime.machine import processor_name

CACHE_GIBIBYTES = (2, 8)
"""Of key/value buffers in the measurement of selection: the runtime's default, and room for all 100 tasks."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare, run the rounds, and report."""
    shop = Workshop(place_order(arguments))
    vocab_size = CONFIGS[arguments.model].vocab_size
    prompt = np.random.default_rng(0).integers(vocab_size, size=arguments.prompt_length).tolist()
    contest = Contest(shop, arguments.peers, prompt, arguments.new_tokens)
    contest.prepare()
    contest.run(arguments.rounds, arguments.reopen)
    return {
        "command": "python examples/compare/run.py " + " ".join(sys.argv[1:]),
        "machine": f"{processor_name()}, {arguments.threads} threads, {platform.system()}",
        **{
            key: getattr(arguments, key) for key in ("model", "prefix_lengths", "prompt_length", "new_tokens", "rounds")
        },
        "read bandwidth, bytes a second": quartiles(
            list(chain(*(each.bandwidths for each in contest.entries.values())))
        ),
        "contestants": contestants_report(contest.entries),
        "task selection": measure_selection(arguments, shop),
    }


def place_order(arguments: argparse.Namespace) -> Order:
    """What the workshop needs to know."""
    lengths = arguments.prefix_lengths
    longest_request = max(lengths) + arguments.prompt_length + arguments.new_tokens
    pythons = {name: python for name in ENVIRONMENTS if (python := getattr(arguments, f"{name}_python"))}
    return Order(arguments.model, lengths, longest_request, arguments.threads, arguments.folder, pythons)


def measure_selection(arguments: argparse.Namespace, shop: Workshop) -> dict[str, Any]:
    """Seconds to select each of 100 tasks, by their prefix length and the room for buffers."""
    found = {}
    for length in arguments.selection_lengths:
        for gib in CACHE_GIBIBYTES:
            with Worker(CONTESTANTS[REFERENCE].command(shop), shop.logs / "selection.log") as worker:
                answer = worker.ask(call="select", prefix_length=length, cache_bytes=gib << 30)
            passes = {when: quartiles(answer[when]) for when in PASSES}
            found[f"prefix length {length}, {gib} GiB of buffers"] = passes
    return found


def main() -> None:
    """Measure, print and write."""
    arguments = parse_arguments()
    try:
        report = measure(arguments)
    except PreparationError as error:
        sys.exit(f"the product itself: {error}")
    text = to_markdown(report)
    print(text)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(text)


def parse_arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="gpt2-medium")
    parser.add_argument("--prefix-lengths", type=int, nargs="+", default=[0, 200])
    parser.add_argument("--peers", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="PEER")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--reopen", action="store_true", help="hold one peer in memory at a time")
    parser.add_argument("--selection-lengths", type=int, nargs="*", default=[], help="of a hundred tasks each")
    for name in ENVIRONMENTS:
        parser.add_argument(f"--{name}-python", type=Path, help="an interpreter in place of one that is made")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=WORK, help="environments and converted weights are kept there")
    parser.add_argument("--output", type=Path, help="write the report to this file as JSON, and beside it as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
