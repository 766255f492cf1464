"""The tables of a bench, and their layout on a terminal. They show milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from prefix_runtime.bench.measurements import (
    BenchReport,
    Cell,
    Comparison,
    Opening,
    Quartiles,
    Ratio,
    Switch,
    quartiles,
)
from prefix_runtime.text_table import as_table, folded

WIDTH = 100
"""Maximum width of a table in characters, if its first column can be shortened to fit."""

_OPENING_SECONDS = ("import_seconds", "open_seconds")
_OPENING_BYTES = ("opened_bytes", "generated_bytes", "resident_bytes")
_LATENCIES = (("time_to_first_token", "to first token"), ("inter_token_latency", "a token"))


@dataclass(frozen=True)
class ReportTable:
    """A title, a header and rows of text; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def as_text(
    report: BenchReport,
    comparison: Comparison | None = None,
    *,
    line_width: int | None = None,
    table_width: int | None = None,
) -> str:
    """A report, with an optional comparison, as text for a terminal.

    Args:
        report: the report.
        comparison: the comparison with another report.
        line_width: characters after which text is wrapped; None does not wrap.
        table_width: maximum characters of a table's line; `WIDTH` if None, and never more.
    """
    blocks = ["\n".join(folded(line, line_width) for line in headline(report))]
    printed = [*tables(report), *(comparison_tables(comparison) if comparison else ())]
    blocks += [_render(table, min(table_width or WIDTH, WIDTH)) for table in printed]
    blocks.append("\n".join(folded(line, line_width) for line in notes(report, comparison)))
    return "\n\n".join(blocks) + "\n"


def headline(report: BenchReport) -> list[str]:
    """The bundle, the machine, the versions and the method, one line each."""
    machine, request = report.machine, report.request
    threads = f"threads {request.threads}" if request.threads else "onnxruntime's choice of threads"
    bandwidth = quartiles(report.bandwidth)
    read = "memory is read" if request.provider == "cpu" else "a copy on the GPU reads and writes"
    return [
        f"{report.subject.label} ({report.subject.name}), {report.subject.weight_bytes / 1e6:.1f} MB of weights a step",
        f"{', '.join(machine.values())}; {threads}, provider {request.provider}",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        f"{request.rounds} interleaved rounds of {request.new_tokens} new tokens; median [first, third quartile]",
        f"{read} at {_spread(bandwidth, 1e-9, 1)} GB/s",
    ]


def tables(report: BenchReport) -> list[ReportTable]:
    """All tables of a report."""
    tables_of_all = [table for setting in report.settings for table in setting_tables(report, setting)]
    return tables_of_all + general_tables(report)


def setting_tables(report: BenchReport, setting: tuple[int, int]) -> list[ReportTable]:
    """The tables of one prompt length and batch size: latency, overhead if prefix 0 was measured, and breakdown."""
    cells, name = report.cells_of(setting), setting_name(setting)
    latency = ("prefix", "ms to first token", "floor", "ms a token", "floor", "tokens/s", "ceiling")
    overhead = ("prefix", *(f"{shown}, 95 % interval" for _, shown in _LATENCIES))
    breakdown = ("prefix", "selection", "prefill", "first step", "a token: weights", "keys, values", "rest")
    compared = [cell for cell in cells if report.overhead(cell, "inter_token_latency")]
    setting_rows = [
        ReportTable(f"{name}: latency", latency, tuple(_latency_row(report, cell) for cell in cells)),
        ReportTable(
            f"{name}: overhead against prefix 0", overhead, tuple(_overhead_row(report, cell) for cell in compared)
        ),
        ReportTable(f"{name}: breakdown in ms", breakdown, tuple(_breakdown_row(report, cell) for cell in cells)),
    ]
    return [table for table in setting_rows if table.rows]


def general_tables(report: BenchReport) -> list[ReportTable]:
    """The tables for all settings: selecting a task, and opening the bundle."""
    general = []
    if report.switches:
        selecting = ("prefix", "ms cold, first request", "ms warm, later requests")
        general.append(ReportTable("selecting a task", selecting, tuple(map(_switch_row, report.switches))))
    if report.openings:
        opening = ("prefix", "s to import", "s to open", "MB once open", "peak MB", "MB after the row")
        several = len(report.settings) > 1
        rows = [_opening_row(_opening_name(each, several=several), [each]) for each in report.openings]
        if len(report.openings) > 1:
            rows.append(_opening_row("median", report.openings))
        general.append(
            ReportTable("opening the bundle and running a row, each in a fresh process", opening, tuple(rows))
        )
    return general


def comparison_tables(comparison: Comparison) -> list[ReportTable]:
    """The latencies of both reports and their ratios, for the rows that both have."""
    compared = []
    for setting in comparison.report.settings:
        pairs = [pair for pair in comparison.cells if pair[0].setting == setting]
        for figure, shown in _LATENCIES:
            title = f"{setting_name(setting)}: A against B, {shown}"
            rows = tuple(_comparison_row(comparison, cell, other, figure) for cell, other in pairs)
            compared.append(ReportTable(title, ("prefix", *_heads(shown)), rows))
    return [table for table in compared if table.rows]


def notes(report: BenchReport, comparison: Comparison | None = None) -> list[str]:
    """Explanations of the figures, and rows that were not measured, one line each."""
    return [*_notes(report), *(_comparison_notes(comparison) if comparison else ())]


def setting_name(setting: tuple[int, int]) -> str:
    """A prompt length and a batch size, for people."""
    return f"prompt {setting[0]}, batch {setting[1]}"


def row_name(row: Cell | Opening | Switch) -> str:
    """A row's name: its prefix length, with its task."""
    return f"{row.task} ({row.prefix_length})" if row.task else str(row.prefix_length)


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, to about four digits."""
    return f"{seconds * 1e3:.{_digits(seconds * 1e3)}f}"


def _notes(report: BenchReport) -> Iterator[str]:
    yield "floor: the time to read the weights once, and every row's keys and values, at the measured bandwidth"
    if any(_is_below_floor(report, cell) for cell in report.cells):
        yield (
            "faster than the floor: weights that fit the processor's caches need not be read from memory, or memory "
            "was slower when it was measured"
        )
    if len(report.cells) > 1 and not any(report.overhead(cell, "inter_token_latency") for cell in report.cells):
        yield "no overhead: there is no row of prefix 0 beside another"
    for line in report.skipped:
        yield f"not measured: {line}"


def _heads(shown: str) -> tuple[str, str, str]:
    return f"A, ms {shown}", f"B, ms {shown}", "A / B"


def _comparison_notes(comparison: Comparison) -> Iterator[str]:
    yield from (f"{letter}: {label}" for letter, label in zip("AB", comparison.labels, strict=True))
    if not comparison.interleaved:
        yield "A and B were not interleaved: what changed on the machine between the two runs is in their ratio"
    left = len(comparison.report.cells) - len(comparison.cells)
    if left:
        yield f"not compared: {left} rows that B does not have"


def _is_below_floor(report: BenchReport, cell: Cell) -> bool:
    return cell.quartiles("inter_token_latency").median < report.step_floor(cell).seconds


def _latency_row(report: BenchReport, cell: Cell) -> tuple[str, ...]:
    rate = cell.quartiles("tokens_per_second").median
    return (
        row_name(cell),
        _spread_ms(cell.quartiles("time_to_first_token")),
        milliseconds(report.first_token_floor(cell).seconds),
        _spread_ms(cell.quartiles("inter_token_latency")),
        milliseconds(report.step_floor(cell).seconds),
        f"{rate:.1f}",
        f"{report.most_tokens_per_second(cell):.1f}",
    )


def _overhead_row(report: BenchReport, cell: Cell) -> tuple[str, ...]:
    return (row_name(cell), *(_shown_overhead(report.overhead(cell, figure)) for figure, _ in _LATENCIES))


def _breakdown_row(report: BenchReport, cell: Cell) -> tuple[str, ...]:
    floor = report.step_floor(cell)
    parts = [cell.quartiles(name).median for name in ("task_selection", "prefill", "first_step")]
    # A step faster than the floor has no rest; a note says so.
    rest = max(0.0, cell.quartiles("inter_token_latency").median - floor.seconds)
    return (row_name(cell), *map(milliseconds, (*parts, floor.weights, floor.key_values, rest)))


def _switch_row(switch: Switch) -> tuple[str, ...]:
    return (row_name(switch), _spread_ms(quartiles(switch.cold)), _spread_ms(quartiles(switch.warm)))


def _opening_name(opening: Opening, *, several: bool) -> str:
    """A row's name, with its prompt length and batch size if the bench has several settings."""
    setting = f", {setting_name((opening.prompt_length, opening.batch_size))}" if several else ""
    return row_name(opening) + setting


def _opening_row(name: str, openings: Sequence[Opening]) -> tuple[str, ...]:
    seconds = (f"{median(getattr(each, field) for each in openings):.2f}" for field in _OPENING_SECONDS)
    return (name, *seconds, *(_megabytes([getattr(each, field) for each in openings]) for field in _OPENING_BYTES))


def _megabytes(size: Sequence[int | None]) -> str:
    known = [each for each in size if each is not None]
    return f"{median(known) / 1e6:.0f}" if known else "unknown"


def _comparison_row(comparison: Comparison, cell: Cell, other: Cell, figure: str) -> tuple[str, ...]:
    ratio = comparison.ratio(cell, other, figure)
    interval = f" [{ratio.interval[0]:.3f}, {ratio.interval[1]:.3f}]" if ratio.interval else ""
    spreads = (_spread_ms(each.quartiles(figure)) for each in (cell, other))
    return (row_name(cell), *spreads, f"{ratio.median:.3f}{interval}")


def _shown_overhead(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""

    def percent(value: float) -> str:
        return f"{(value - 1) * 100:+.1f}"

    interval = f" [{percent(ratio.interval[0])}, {percent(ratio.interval[1])}]" if ratio.interval else ""
    return f"{percent(ratio.median)} %{interval}"


def _spread_ms(spread: Quartiles) -> str:
    return _spread(spread, 1e3, _digits(spread.median * 1e3))


def _spread(spread: Quartiles, scale: float, digits: int) -> str:
    median, first, third = (f"{value * scale:.{digits}f}" for value in (spread.median, spread.first, spread.third))
    return f"{median} [{first}, {third}]"


def _digits(value: float) -> int:
    """The number of decimals for about four digits in total."""
    return 1 if value >= 100 else 2 if value >= 1 else 3


def _render(table: ReportTable, width: int) -> str:
    return f"{table.title}\n{as_table(table.header, table.rows, width)}"
