"""What a prefix costs on a GPU, beside torch on the same weights and the same prefix, in one run.

python gpu.py --model gpt2-medium --rounds 5 --steps 200 --output gpu-gpt2-medium

Writes OUTPUT.json and OUTPUT.md. Every contestant runs in a process of its own, idle while others run: whatever else
runs in a process lengthens its steps. A row is a contestant at a prefix length; every row runs once a round, the rounds
in shuffled order. A latency is what passes on the host from one token to the next, the token read back included. To the
first token the product chooses its task; torch begins when the prefix lies in the cache, and with a step not compiled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from figures import alike, markdown_table, quartiles, show
from worker import Worker

from prefix_runtime import Bundle, Cuda
from prefix_runtime.backends.gpu.device import Device
from prefix_runtime.bench.bandwidth import CopyProbe
from prefix_runtime.machine import versions

HERE = Path(__file__).parent
PRODUCT, ON_HOST = "prefix-export", "prefix-export, prefixes on the host"
PROMPT = [5 + index for index in range(32)]
PEERS = {"compile": "torch, compile", "eager": "torch, eager", "no-graphs": "prefix-export, no CUDA graphs"}
WARM_UP_PAIRS = 2


@dataclass
class Row:
    """A contestant at a prefix length: each round's median latency and first token, and what it answered."""

    name: str
    prefix_length: int
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def measure(arguments: argparse.Namespace, workshop: Path) -> dict[str, Any]:
    """All figures, in seconds and bytes."""
    workshop.mkdir(parents=True, exist_ok=True)
    bundle = workshop / "bundle"
    if not bundle.exists():
        script, options = str(HERE / "random_bundle.py"), ("--target", "cuda", "--precision", arguments.precision)
        if subprocess.run([sys.executable, script, arguments.model, str(bundle), *options], check=False).returncode:
            sys.exit(f"{bundle}: could not be built")
    manifest = Bundle.open(bundle).manifest
    if (manifest.model.name, manifest.precision) != (arguments.model, arguments.precision):
        sys.exit(
            f"{bundle}: expected {arguments.model} in {arguments.precision}, found {manifest.model.name} in "
            f"{manifest.precision}; choose another --workshop"
        )
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker([sys.executable, *command], workshop / f"{name}.log"))
            for name, command in commands(arguments, bundle).items()
        }
        away = workers.pop(ON_HOST)
        rows = [Row(name, length) for name in workers for length in arguments.prefix_lengths]
        run_rounds(rows, workers, arguments.rounds, arguments.steps + 1)
        product = workers[PRODUCT]
        found = {
            "opening": product.opened["open_seconds"],
            "versions": {key: text for each in workers.values() for key, text in each.opened["versions"].items()},
            **batches(product, arguments),
            "switch, on the GPU": switching(product, max(arguments.prefix_lengths), 2001),
            "switch, on the host": switching(away, max(arguments.prefix_lengths), 51),
        }
    return summary(arguments, rows, manifest.weight_bytes) | found


def commands(arguments: argparse.Namespace, bundle: Path) -> dict[str, list[str]]:
    """How each contestant's process is started."""
    dtype = "bfloat16" if arguments.precision == "bf16" else "float16"
    product, torch = (str(HERE / "peers" / f"cuda_{name}.py") for name in ("product", "torch"))
    options = {
        "compile": [torch, str(bundle), arguments.model, dtype, "compile"],
        "eager": [torch, str(bundle), arguments.model, dtype, "eager"],
        "no-graphs": [product, str(bundle), "--no-graphs"],
    }
    peers = {PEERS[peer]: options[peer] for peer in arguments.peers}
    return {PRODUCT: [product, str(bundle)], **peers, ON_HOST: [product, str(bundle), "--on-host"]}


def run_rounds(rows: Sequence[Row], workers: dict[str, Worker], rounds: int, new_tokens: int) -> None:
    """Run every row once a round; the first round warms up and is forgotten.

    Who has idled while others ran answers a short request before it is timed.
    """
    random = np.random.default_rng(0)
    for number in range(rounds + 1):
        for index in random.permutation(len(rows)):
            row, request = rows[index], {"prefix_length": rows[index].prefix_length, "prompt": PROMPT}
            if number:
                workers[row.name].ask(**request, new_tokens=8)
            answer = workers[row.name].ask(**request, new_tokens=new_tokens)
            row.latencies.append(answer["inter_token"])
            row.first_tokens.append(answer["first_token"])
            row.tokens = answer["tokens"]
        print(f"round {number} of {rounds}", flush=True)
    for row in rows:
        del row.latencies[0], row.first_tokens[0]


def batches(product: Worker, arguments: argparse.Namespace) -> dict[str, Any]:
    """A batch whose rows are all of different tasks, and one whose rows are of one, in turn."""
    request = {"prefix_length": max(arguments.prefix_lengths), "rows": arguments.batch, "prompt": PROMPT}
    many, one = [], []
    for _ in range(arguments.rounds + 1):  # the first warms up
        for tasks, seconds in ((arguments.batch, many), (1, one)):
            answer = product.ask(call="batch", **request, tasks=tasks, new_tokens=arguments.steps + 1)
            seconds.append(answer["inter_token"])
    return {
        "batch": arguments.batch,
        "batch of many tasks": quartiles(many[1:]),
        "batch of one task": quartiles(one[1:]),
        "many/one": ratio(many[1:], one[1:]),
    }


def switching(product: Worker, prefix_length: int, pairs: int) -> dict[str, float]:
    """Seconds to the first token more where another task asked before than in the same task's next request."""
    request = {"prefix_length": prefix_length, "pairs": WARM_UP_PAIRS + pairs, "prompt": PROMPT}
    seconds = product.ask(call="switch", **request)
    more = [another - same for another, same in zip(seconds["another"], seconds["same"], strict=True)]
    return quartiles(more[WARM_UP_PAIRS:])


def summary(arguments: argparse.Namespace, rows: Sequence[Row], weight_bytes: int) -> dict[str, Any]:
    """What the rows took, beside the floor; asks the GPU, so that it comes last."""
    device = Device(Cuda())
    bandwidth = CopyProbe(device).measure()
    product = {row.prefix_length: row for row in rows if row.name == PRODUCT}
    return {
        "command": f"python examples/compare/gpu.py {' '.join(Path(part).name for part in arguments.given)}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": device.name,
        "weight_bytes": weight_bytes,
        "bytes_per_second": bandwidth,
        "floor": weight_bytes / bandwidth,
        "rows": [
            {
                "name": row.name,
                "prefix_length": row.prefix_length,
                "latency": quartiles(row.latencies),
                "first_token": quartiles(row.first_tokens),
                "against the product": ratio(product[row.prefix_length].latencies, row.latencies),
                "tokens": alike(product[row.prefix_length].tokens, row.tokens),
            }
            for row in rows
        ],
        "prefix/none": {
            length: ratio(row.latencies, product[0].latencies) for length, row in product.items() if length
        },
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of two rows, within each round."""
    return quartiles([first / second for first, second in zip(above, below, strict=True)])


def as_markdown(found: dict[str, Any]) -> str:
    """The figures as tables, in milliseconds."""
    lines = [
        f"`{found['command']}`",
        "",
        f"{found['gpu']}, {found['created'][:10]}, {', '.join(map(' '.join, found['versions'].items()))}.",
        "",
        f"{found['weight_bytes'] / 1e6:.0f} MB of weights, a copy moves {found['bytes_per_second'] / 1e12:.2f} TB/s:",
        f"a floor of {found['floor'] * 1e3:.3f} ms a token. Medians [quartiles] of rounds; ratios within rounds.",
        "",
    ]
    header = ("", "prefix", "ms a token", "product / this", "to the first, ms", "first tokens alike")
    table = [
        (
            row["name"],
            row["prefix_length"],
            show(row["latency"], 1e3, 3),
            show(row["against the product"]),
            show(row["first_token"], 1e3),
            row["tokens"],
        )
        for row in found["rows"]
    ]
    lines += [*markdown_table(header, table), ""]
    many, one = (show(found[f"batch of {name}"], 1e3, 3) for name in ("many tasks", "one task"))
    near, far = (show(found[f"switch, on the {place}"], 1e3, 3) for place in ("GPU", "host"))
    lines += [f"- prefix {length} / none: {show(figure, 1, 3)}" for length, figure in found["prefix/none"].items()]
    lines += [
        f"- {found['batch']} rows of as many tasks, ms a step: {many}; of one {one}",
        f"- ratio of these: {show(found['many/one'], 1, 3)}",
        f"- another task than before, ms to the first token more: its prefix on the GPU {near}, on the host {far}",
        f"- opening {found['opening']:.1f} s",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line asks for and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-medium", help="of prefix_export.models.random_model")
    parser.add_argument("--precision", choices=["fp16", "bf16"], default="fp16", help="which torch has too")
    parser.add_argument("--prefix-lengths", type=int, nargs="+", default=[0, 200])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[*PEERS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workshop", type=Path, help="folder of bundle and logs, kept; default: a temporary one")
    parser.add_argument("--output", type=Path, required=True, help="without .json and .md")
    arguments = parser.parse_args()
    arguments.given = sys.argv[1:]
    if 0 not in arguments.prefix_lengths or max(arguments.prefix_lengths) == 0:
        parser.error("--prefix-lengths: expected 0, and one above it")
    if arguments.workshop and arguments.workshop.resolve() == Path(arguments.model).resolve():
        parser.error("--workshop: expected another folder than one by the model's name, which would be taken for it")
    if not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output: {arguments.output.absolute().parent}: expected a folder to write into, found none")
    with nullcontext(arguments.workshop) if arguments.workshop else tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    found["versions"] |= {"python": versions()["python"]}
    arguments.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(as_markdown(found))
    print(as_markdown(found))


if __name__ == "__main__":
    main()
