"""What 1, 10 and 100 tasks take on disk and in memory, and to switch: as prefixes, as merged models, as LoRA.

    python examples/compare/footprint.py --model gpt2-medium --prefix-length 200

Memory is the resident memory of a fresh process after one request of every task. What was not measured at its size is
marked as computed; `README.md` says from what.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from environments import PreparationError
from figures import PASSES, markdown_table, quartiles, show
from random_model import CONFIGS, LORA_RANK
from worker import Worker
from workshop import HERE, WORK, Order, Workshop

from prefix_runtime import Bundle
from prefix_runtime.bench.inputs import random_prefix
from prefix_runtime.machine import processor_name

PRODUCT_PRECISIONS = ("float32", "int8")


@dataclass(frozen=True)
class Footprint:
    """A row: so many tasks in one way.

    Attributes:
        disk_bytes, resident_bytes: and beside each what it was computed from, or None where it was measured.
        switching: seconds to switch to a task, quartiles by whether it was asked for before.
    """

    way: str
    tasks: int
    disk_bytes: int
    disk_computed_from: str | None
    resident_bytes: int
    memory_computed_from: str | None
    switching: dict[str, dict[str, float]]


def measure_prefixes(shop: Workshop, precision: str, counts: list[int]) -> Iterator[Footprint]:
    """One engine of the product; every task's file is real and unlike the others."""
    folder, length = shop.bundle(precision), max(shop.order.lengths)
    bundle = Bundle.open(folder)
    for count in sorted(counts):
        for index in range(len(bundle.tasks), count):
            bundle.add_task(f"task-{index}", random_prefix(bundle, length, index))
        answer = _ask(shop, "product.py", folder)
        way = f"prefixes of length {length}, {precision} weights"
        yield Footprint(way, count, _size(folder), None, answer["resident_bytes"], None, _switching(answer))
    shutil.rmtree(folder)  # gigabytes, and no other run uses it


def measure_merged(shop: Workshop, precision: str, counts: list[int]) -> Iterator[Footprint]:
    """Whole models. One and two are measured, and what the second adds stands for each further one."""
    folder = shop.bundle(precision)
    disk = _size(folder) - _size(folder / "prefixes")
    one, two = (_ask(shop, "merged.py", folder, tasks=count) for count in (1, 2))
    added = two["resident_bytes"] - one["resident_bytes"]
    for count in counts:
        memory = one["resident_bytes"] + (count - 1) * added
        sources = None if count == 1 else "1 model", None if count <= 2 else "1 and 2 models"
        way = f"merged models, {precision} weights"
        yield Footprint(way, count, count * disk, sources[0], memory, sources[1], _switching(two))


def measure_lora(shop: Workshop, counts: list[int]) -> Iterator[Footprint]:
    """PEFT's model with every adapter loaded, unmerged; adapters are one file, loaded again under other names."""
    model, adapter = _size(shop.model), _size(shop.adapters / "lora")
    for count in counts:
        answer = _ask(shop, "peft_eager.py", shop.model, shop.adapters, options=["--lora"], tasks=count)
        disk, source = model + count * adapter, None if count == 1 else "1 adapter"
        way = f"LoRA of rank {LORA_RANK} unmerged in PEFT, float32 weights"
        yield Footprint(way, count, disk, source, answer["resident_bytes"], None, _switching(answer))


def _ask(shop: Workshop, script: str, *things: Path, options: list[str] | None = None, **request: Any) -> Any:
    """What a fresh worker answers that has answered one request of every task."""
    arguments = [*map(str, things), str(shop.order.threads), *(options or [])]
    command = [sys.executable, str(HERE / "peers" / script), *arguments]
    with Worker(command, shop.logs / f"footprint-{script}.log") as worker:
        return worker.ask(call="answer_each", **request)


def _switching(answer: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {when: quartiles(answer[when]) for when in PASSES if when in answer}


def _size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every way, and why one could not be had."""
    order = Order(arguments.model, [arguments.prefix_length], 0, arguments.threads, arguments.folder, {})
    shop, counts = Workshop(order), arguments.tasks
    rows, missing = list(measure_lora(shop, counts)), {}
    for precision in PRODUCT_PRECISIONS:
        try:
            # Merged models first: their bundle has no other tasks yet.
            rows += [*measure_merged(shop, precision, counts), *measure_prefixes(shop, precision, counts)]
        except PreparationError as error:
            missing[f"{precision} weights"] = str(error)
    return {
        "command": "python examples/compare/footprint.py " + " ".join(sys.argv[1:]),
        "machine": f"{processor_name()}, {arguments.threads} threads",
        "rows": [asdict(row) for row in rows],
        "missing": missing,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    header = ("tasks", "as", "disk, MB", "memory, MB", *(f"ms to switch, {when}" for when in PASSES))
    rows = [_cells(row) for row in sorted(report["rows"], key=lambda row: row["tasks"])]
    missing = [f"Not measured: {what}: {reason}" for what, reason in report["missing"].items()]
    return "\n".join([f"`{report['command']}`", "", report["machine"], "", *markdown_table(header, rows), "", *missing])


def _cells(row: dict[str, Any]) -> list[str]:
    sizes = [
        f"{row[key] / 1e6:.0f}" + (f" (computed from {row[source]})" if row[source] else "")
        for key, source in (("disk_bytes", "disk_computed_from"), ("resident_bytes", "memory_computed_from"))
    ]
    return [str(row["tasks"]), row["way"], *sizes, *(show(row["switching"].get(when), 1e3, 3) for when in PASSES)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="gpt2-medium")
    parser.add_argument("--prefix-length", type=int, default=200)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=WORK, help="environments and converted weights are kept there")
    parser.add_argument("--output", type=Path, help="write the report to this file as JSON, and beside it as Markdown")
    arguments = parser.parse_args()
    report = measure(arguments)
    text = to_markdown(report)
    print(text)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
