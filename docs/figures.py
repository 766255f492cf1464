"""Renders the tables of the documentation from the reports that are committed as JSON.

    python docs/figures.py            writes every table into its page
    python docs/figures.py --check    exits with 1 if a committed table differs

A page marks a table with two comments, and everything between them is written by this script:

    <!-- figures: NAME -->
    <!-- /figures -->

`FIGURES` at the end lists the names.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- /figures -->)", re.DOTALL)
_BLOCK_128 = "prefix-export, int8, block 128"

# Reports of run.py and footprint.py do not say when they were made: the day on which they were committed. In some, int8
# had blocks of 128 by default, so their rows get the name that they have today.
_DATES = {
    "gpt2-medium-epyc": "2026-11-27",
    "gpt2-medium": "2026-11-23",
    "llama-1b-epyc": "2026-11-27",
    "llama-1b": "2026-11-23",
    "footprint": "2026-11-23",
}
_RENAMED = {
    "gpt2-medium": {
        "prefix-export, int8": _BLOCK_128,
        "prefix-export, int8, keys and values too": f"{_BLOCK_128}, int8 cache",
    },
    "llama-1b-epyc": {"prefix-export, int8": _BLOCK_128},
    "llama-1b": {"prefix-export, int8": _BLOCK_128},
}
_LABELS = {
    "prefix-export, int8, keys and values too": "prefix-export, int8, int8 cache",
    "prefix-export, int4, keys and values int8": "prefix-export, int4, int8 cache",
    "prefix-export, float32, text as prompt": "prefix-export, float32, text in place of the prefix",
}
_README_ROWS = ("product-float32", "peft-eager", "product-int8", "llama-q8_0")
_GPU_ROWS = {
    "prefix-export": "prefix-export",
    "prefix-export, no CUDA graphs": "prefix-export without CUDA graphs",
    "torch, compile": '`torch.compile`, `mode="reduce-overhead"`, static cache',
}


def main() -> None:
    """Write or check every page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a committed table differs")
    is_check = parser.parse_args().check
    stale = [page for page in pages() if (text := page.read_text(encoding="utf-8")) != rendered(text)]
    for page in stale:
        if is_check:
            print(f"{page.relative_to(ROOT)}: expected the tables of the reports; run: python docs/figures.py")
        else:
            page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
    raise SystemExit(1 if is_check and stale else 0)


def pages() -> list[Path]:
    """The README and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(text: str) -> str:
    """A page's text with every marked table as the reports have it."""
    return _MARKED.sub(lambda match: f"{match[1]}{FIGURES[match[2]]()}\n{match[4]}", text)


def _cpu(name: str) -> str:
    report = _report(name)
    header = [
        "",
        *_by_length("ms a token", report),
        *_by_length("ms to the first", report),
        "opens in, s",
        "memory, MB",
    ]
    rows = [_cpu_row(name, contestant, report) for contestant in _measured(report)]
    return _table(header, rows) + _caption(name, report)


def _cpu_row(name: str, contestant: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    figures = [contestant["lengths"][str(length)] for length in report["prefix_lengths"]]
    has_none = contestant["prefix"].startswith("none")  # its rows of longer prefixes are the same once more
    shown = [
        figure if length == 0 or not has_none else None
        for length, figure in zip(report["prefix_lengths"], figures, strict=True)
    ]
    return [
        _label(name, contestant["label"]),
        *(_median(figure and figure["inter_token"], 1e3) for figure in shown),
        *(_median(figure and figure["first_token"], 1e3, 0) for figure in shown),
        f"{contestant['open_seconds']:.2f}",
        f"{max(figure['resident_bytes'] for figure in figures) / 1e6:.0f}",
    ]


def _cpu_ratios(name: str) -> str:
    """What a prefix costs, and how far a step is from reading memory."""
    report = _report(name)
    lengths = report["prefix_lengths"]
    growth = f"prefix {lengths[-1]} over {lengths[0]}"
    header = ["", f"a token, {growth}", f"first token, {growth}", *_by_length("a token over its floor", report)]
    rows = []
    for contestant in _measured(report):
        ratios = [contestant["longest over shortest"][field] for field in ("inter_token", "first_token")]
        floors = [contestant["lengths"][str(length)].get("inter_token over floor") for length in lengths]
        rows.append([_label(name, contestant["label"]), *map(_spread, [*ratios, *floors])])
    return _table(header, rows) + _caption(name, report)


def _readme() -> str:
    name = "gpt2-medium-epyc"
    report = _report(name)
    header = ["milliseconds", *_by_length("a token", report), *_by_length("to the first", report)]
    rows = [_cpu_row(name, report["contestants"][row], report)[:-2] for row in _README_ROWS]
    return _table(header, rows)


def _gpu() -> str:
    names = {"H200": "gpu-gpt2-medium-h200", "H100": "gpu-gpt2-medium"}
    reports = {gpu: _report(name) for gpu, name in names.items()}
    lengths = sorted({row["prefix_length"] for report in reports.values() for row in report["rows"]})
    header = ["milliseconds a token", *(f"{gpu}, prefix {length}" for gpu in names for length in lengths)]
    rows = [_gpu_row(label, name, reports, lengths) for name, label in _GPU_ROWS.items()]
    rows.append(["reading the weights", *_floors(reports, lengths)])
    llama = {"H200": _report("gpu-llama-8b-h200"), "H100": _report("gpu-llama-8b")}
    rows.append(_gpu_row("prefix-export, a Llama of 8 billion", "prefix-export", llama, lengths))
    rows.append(["reading its weights", *_floors(llama, lengths)])
    return _table(header, rows) + "".join(_gpu_caption(report) for report in (*reports.values(), *llama.values()))


def _gpu_row(label: str, name: str, reports: Mapping[str, Mapping[str, Any]], lengths: Sequence[int]) -> list[str]:
    latencies = [
        next(row["latency"] for row in report["rows"] if (row["name"], row["prefix_length"]) == (name, length))
        for report in reports.values()
        for length in lengths
    ]
    return [label, *(_median(latency, 1e3, 3) for latency in latencies)]


def _floors(reports: Mapping[str, Mapping[str, Any]], lengths: Sequence[int]) -> Iterator[str]:
    for report in reports.values():
        yield f"{report['floor'] * 1e3:.3f}"
        yield from [""] * (len(lengths) - 1)


def _gpu_tasks() -> str:
    names = {
        "GPT-2-medium, H200": "gpu-gpt2-medium-h200",
        "GPT-2-medium, H100": "gpu-gpt2-medium",
        "Llama of 8 billion, H200": "gpu-llama-8b-h200",
        "Llama of 8 billion, H100": "gpu-llama-8b",
    }
    reports = [_report(name) for name in names.values()]
    rows: list[tuple[str, str, float, int]] = [
        ("32 rows of 32 tasks, ms a step", "batch of many tasks", 1e3, 3),
        ("32 rows of one task, ms a step", "batch of one task", 1e3, 3),
        ("ratio of these", "many/one", 1, 3),
        ("another task, its prefix on the GPU, ms more to the first token", "switch, on the GPU", 1e3, 3),
        ("another task, its prefix on the host, ms more to the first token", "switch, on the host", 1e3, 2),
    ]
    table = [
        [label, *(_spread(report[key], scale, digits) for report in reports)] for label, key, scale, digits in rows
    ]
    table.append(["prefix 200 over 0, a token", *(_spread(report["prefix/none"]["200"], 1, 3) for report in reports)])
    table.append(["opening, s", *(f"{report['opening']:.1f}" for report in reports)])
    return _table(["", *names], table) + "\nMedians [quartiles], from the reports of the table above.\n"


def _footprint() -> str:
    report = _report("footprint")
    header = ["tasks", "as", "disk, MB", "memory, MB", "ms to switch, first request", "later requests"]
    rows = []
    for row in report["rows"]:
        sizes = [
            _megabytes(row, "disk_bytes", "disk_computed_from"),
            _megabytes(row, "resident_bytes", "memory_computed_from"),
        ]
        switching = [_median(row["switching"].get(when), 1e3, 2) for when in ("first request", "later requests")]
        rows.append(
            [str(row["tasks"]), row["way"].replace("int8 weights", "int8 weights, block 128"), *sizes, *switching]
        )
    return _table(header, rows) + _caption("footprint", report)


def _megabytes(row: Mapping[str, Any], field: str, source: str) -> str:
    computed = f" (computed from {row[source]})" if row[source] else ""
    return f"{row[field] / 1e6:,.0f}{computed}"


def _demo() -> str:
    report = json.loads((ROOT / "examples" / "demo" / "results.json").read_text(encoding="utf-8"))
    kinds = list(next(iter(report["scores"].values())))
    rows = [
        [prefix, *(f"{by[kind]['exact_match_percent']:.1f} % ({by[kind]['bleu']:.1f})" for kind in kinds)]
        for prefix, by in report["scores"].items()
    ]
    caption = (
        f"\n{report['held_out_tables']} held-out tables, {report['decoding']}; exact match, and BLEU in brackets "
        "(`python examples/demo/evaluate.py`, 2026-11-22, one CPU thread).\n"
    )
    return _table(["prefix", *kinds], rows) + caption


def _report(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((ROOT / "examples" / "compare" / f"{name}.json").read_text(encoding="utf-8"))
    return report


def _measured(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [contestant for contestant in report["contestants"].values() if "reason" not in contestant]


def _by_length(what: str, report: Mapping[str, Any]) -> list[str]:
    return [f"{what}, prefix {length}" for length in report["prefix_lengths"]]


def _label(report: str, label: str) -> str:
    label = _RENAMED.get(report, {}).get(label, _LABELS.get(label, label))
    return f"**{label}**" if label.startswith("prefix-export") else label


def _median(figure: Mapping[str, float] | None, scale: float = 1, digits: int = 1) -> str:
    return "" if figure is None else f"{figure['median'] * scale:.{digits}f}"


def _spread(figure: Mapping[str, float] | None, scale: float = 1, digits: int = 2) -> str:
    if figure is None:
        return ""
    median, first, third = (f"{figure[key] * scale:.{digits}f}" for key in ("median", "first", "third"))
    return f"{median} [{first}, {third}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _caption(name: str, report: Mapping[str, Any]) -> str:
    contestants = report.get("contestants", {}).values()
    versions = sorted({f"{name} {version}" for one in contestants for name, version in one.get("versions", {}).items()})
    rounds = f"medians of {report['rounds']} rounds, " if "rounds" in report else ""
    lines = [
        f"{report['machine']}, {_DATES[name]}, {rounds}batch 1.",
        *([f"{', '.join(versions)}."] if versions else []),
    ]
    return "\n" + " ".join(lines) + f"\n`{report['command']}`\n"


def _gpu_caption(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"\n{report['gpu']}, {report['created'][:10]}, {versions}.\n`{report['command']}`\n"


def _real() -> str:
    """Each precision against PEFT on a pretrained model: exact match of every task, and texts equal to PEFT's."""
    report = json.loads((ROOT / "examples" / "real" / "results.json").read_text(encoding="utf-8"))
    tasks = list(report["adapters"])
    header = ["", *(f"{task}: exact match, %" for task in tasks), *(f"{task}: equal to PEFT, %" for task in tasks)]
    keys = ("exact_match_percent", "equal_to_peft_percent")
    rows = [
        [one["label"], *(f"{one['tasks'][task][key]:.1f}" for key in keys for task in tasks)]
        for one in report["contestants"].values()
    ]
    return _table(header, rows) + f"\n{report['held_out_tables']} held-out tables per task, greedy decoding.\n"


FIGURES: Mapping[str, Callable[[], str]] = {
    "readme": _readme,
    "cpu-epyc": lambda: _cpu("gpt2-medium-epyc"),
    "cpu-epyc-ratios": lambda: _cpu_ratios("gpt2-medium-epyc"),
    "cpu-xeon": lambda: _cpu("gpt2-medium"),
    "llama-epyc": lambda: _cpu("llama-1b-epyc"),
    "llama-epyc-ratios": lambda: _cpu_ratios("llama-1b-epyc"),
    "llama-xeon": lambda: _cpu("llama-1b"),
    "gpu": _gpu,
    "gpu-tasks": _gpu_tasks,
    "footprint": _footprint,
    "demo": _demo,
    "real": _real,
}

if __name__ == "__main__":
    main()
