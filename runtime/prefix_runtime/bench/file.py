"""The files of a bench: JSON, which later runs can be compared with, and CSV with one line per row."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from prefix_runtime.checks import is_finite, is_whole
from prefix_runtime.errors import BenchError
from prefix_runtime.json_reader import DataclassReader, expect, unexpected

from .measurements import BYTES_PER_VALUE, BenchReport, Cell, Ratio, quartiles

FORMAT = "prefix-export.bench"
FORMAT_VERSION = 2
MOST_BYTES = 256 << 20
"""Maximum size of a report."""

FIGURES = ("time_to_first_token", "task_selection", "prefill", "first_step", "inter_token_latency", "tokens_per_second")
"""Names of the figures of a `Sample`."""

# Limits of seconds and of bytes per second: ratios of numbers between them stay finite.
_LEAST, _MOST = 1e-12, 1e15
_LONGEST_TEXT = 10_000


def to_json(report: BenchReport, against: BenchReport | None = None) -> str:
    """A report as JSON: every sample, derived figures under `summary`, and another report under `against`."""
    content = _document(report)
    if against is not None:
        content["against"] = _document(against)
    return json.dumps(content, indent=1) + "\n"


def from_json(text: str, where: str) -> BenchReport:
    """The report in a JSON text, without its `summary` and `against`. `where` names it in messages.

    Raises:
        BenchError: the text is not a report, is of another version, or a field is wrong; the message names it.
    """
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{where}: expected a report that `bench --json` wrote, found no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        actual = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise BenchError(
            f"{where}: expected a report that `bench --json` wrote, of format {FORMAT!r}, found {actual!r}"
        )
    version = _read_count(content.get("format_version"), f"{where}: format_version")
    if version != FORMAT_VERSION:
        advice = "update prefix-runtime" if version > FORMAT_VERSION else "measure again"
        raise BenchError(f"{where}: expected format version {FORMAT_VERSION}, found {version}; {advice}")
    report = _READER.read(BenchReport, content, where)
    _check(report, where)
    return report


def to_csv(reports: Sequence[BenchReport]) -> str:
    """The rows of one or more reports as CSV with a header: seconds, and ratios against prefix length 0."""
    rows = [row for report in reports for row in summary(report)]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summary(report: BenchReport) -> list[dict[str, object]]:
    """The derived figures of each row: quartiles in seconds, floors, overhead against prefix length 0."""
    return [_summary_of(report, cell) for cell in report.cells]


def _summary_of(report: BenchReport, cell: Cell) -> dict[str, object]:
    row: dict[str, object] = {
        "bundle": report.subject.name,
        "model": report.subject.model,
        "precision": report.subject.precision,
        "task": cell.task,
        "prefix_length": cell.prefix_length,
        "prompt_length": cell.prompt_length,
        "batch_size": cell.batch_size,
        "rounds": len(cell.samples),
    }
    for name in FIGURES:
        spread = cell.quartiles(name)
        row |= {name: spread.median, f"{name}_first_quartile": spread.first, f"{name}_third_quartile": spread.third}
    step, switch = report.step_floor(cell), report.switch(cell)
    row |= {
        "task_switch_cold": quartiles(switch.cold).median if switch else None,
        "task_switch_warm": quartiles(switch.warm).median if switch else None,
        "open_seconds": report.open_seconds(cell),
        "bytes_per_second": report.bytes_per_second,
        "time_to_first_token_floor": report.first_token_floor(cell).seconds,
        "inter_token_latency_floor": step.seconds,
        "floor_of_weights": step.weights,
        "floor_of_keys_and_values": step.key_values,
        "tokens_per_second_ceiling": report.most_tokens_per_second(cell),
        "peak_bytes": report.peak_bytes(cell),
    }
    for name in ("time_to_first_token", "inter_token_latency"):
        row |= _overhead_of(name, report.overhead(cell, name))
    return row


def _overhead_of(name: str, ratio: Ratio | None) -> dict[str, object]:
    low, high = (ratio.interval if ratio else None) or (None, None)
    ends = {f"{name}_ratio_low": low, f"{name}_ratio_high": high}
    return {f"{name}_ratio": ratio.median if ratio else None, **ends}


def _document(report: BenchReport) -> dict[str, Any]:
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    return {**head, **asdict(report), "summary": summary(report)}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _read_count(value: Any, where: str) -> int:
    if not is_whole(value, 0, _MOST):
        raise unexpected(int, value, where, BenchError)
    return value


def _read_text(value: Any, where: str) -> str:
    text = expect(str, value, where, BenchError)
    if len(text) > _LONGEST_TEXT or any(map(_is_control, text)):
        raise BenchError(f"{where}: expected at most {_LONGEST_TEXT} characters, no control ones, found {text[:60]!r}")
    return text


def _is_control(character: str) -> bool:
    """Whether a character controls a terminal, or is half of a surrogate pair, which cannot be written."""
    return unicodedata.category(character) in ("Cc", "Cs")


def _read_float(value: Any, where: str) -> float:
    if not is_finite(value) or not (value == 0 or _LEAST <= value <= _MOST):
        raise BenchError(f"{where}: expected 0 or a number from {_LEAST:g} to {_MOST:g}, found {str(value)[:60]!r}")
    return float(value)


_READER = DataclassReader(BenchError, {int: _read_count, float: _read_float, str: _read_text})


def _check(report: BenchReport, where: str) -> None:
    """Refuse reports that no bench writes, and numbers that cannot be divisors."""
    rounds = report.request.rounds
    counts = {
        "bandwidth": [len(report.bandwidth)],
        "cells": [len(cell.samples) for cell in report.cells],
        "switches": [len(times) for switch in report.switches for times in (switch.cold, switch.warm)],
    }
    for name, sizes in counts.items():
        if any(count != rounds for count in sizes):
            raise BenchError(f"{where}: {name}: expected a sample for each of {rounds} rounds, found {min(sizes)}")
    if not report.cells or len({cell.key for cell in report.cells}) != len(report.cells):
        raise BenchError(f"{where}: cells: expected at least one, and each once")
    if not all(size for cell in report.cells for size in (cell.prompt_length, cell.batch_size)):
        raise BenchError(f"{where}: cells: expected prompts of a token or more in a row or more, found 0")
    figures = [figure for cell in report.cells for name in FIGURES[-2:] for figure in cell.figure(name)]
    figures += [figure for cell in report.cells for figure in cell.figure("time_to_first_token")]
    if not all((*figures, *report.bandwidth, report.subject.weight_bytes)):
        raise BenchError(f"{where}: expected times, rates and weight_bytes above 0, found 0")
    if any(each < 0 for cell in report.cells for each in cell.figure("prefill")):
        raise BenchError(
            f"{where}: cells: expected a task_selection of at most the time_to_first_token, found a longer"
        )
    if report.subject.cache not in BYTES_PER_VALUE:
        raise BenchError(
            f"{where}: subject: cache: expected one of {', '.join(BYTES_PER_VALUE)}, found {report.subject.cache!r}"
        )
