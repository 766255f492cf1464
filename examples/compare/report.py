"""A contest's report, for programs as JSON and for people as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contest import Entry
from contestants import CONTESTANTS, NONE
from figures import PASSES, markdown_table, quartiles, show

FIELDS = ("inter_token", "first_token")
PRODUCT = {"float32": "product-float32", "int8": "product-int8", "int4": "product-int4"}
"""Which of the product's rows a contestant's ratio is taken with: the one of its own precision."""


def contestants_report(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Every contestant by name, those that dropped out with their reason."""
    return {name: _contestant(name, entry, entries) for name, entry in entries.items()}


def _contestant(name: str, entry: Entry, entries: Mapping[str, Entry]) -> dict[str, Any]:
    contestant = CONTESTANTS[name]
    about = {"label": contestant.label, "precision": contestant.precision, "prefix": contestant.prefix}
    if entry.reason is not None:
        return about | {"reason": entry.reason}
    lengths = {
        str(length): _figures(entry, length)
        | _floor(entry, length)
        | _ratios(entry, length, entries.get(PRODUCT[contestant.precision]))
        for length in entry.answers
    }
    return about | entry.opened | {"lengths": lengths, "longest over shortest": _growth(entry)}


def _figures(entry: Entry, length: int) -> dict[str, Any]:
    answers = entry.answers[length]
    return {
        **{field: quartiles([answer[field] for answer in answers]) for field in FIELDS},
        "resident_bytes": max(answer["resident_bytes"] for answer in answers),
        "equal_tokens": entry.equal_tokens[length],
        "tokens": len(answers[0]["tokens"]),
    }


def _floor(entry: Entry, length: int) -> dict[str, Any]:
    """Seconds in which memory was read, before each turn, as much as a step has to; and the step over that."""
    pairs = list(zip(entry.answers[length], entry.bandwidths, strict=True))
    if any(answer["step_bytes"] is None for answer, _ in pairs):
        return {"floor": None, "inter_token over floor": None}
    floors = [answer["step_bytes"] / bandwidth for answer, bandwidth in pairs]
    ratios = [answer["inter_token"] / floor for (answer, _), floor in zip(pairs, floors, strict=True)]
    return {"floor": quartiles(floors), "inter_token over floor": quartiles(ratios)}


def _ratios(entry: Entry, length: int, product: Entry | None) -> dict[str, Any]:
    """The product's time over this contestant's, round by round; none where the product has no such row."""
    if product is None or product.reason is not None:
        return {f"{field}, product over this": None for field in FIELDS}
    return {
        f"{field}, product over this": _ratio(product.answers[length], entry.answers[length], field) for field in FIELDS
    }


def _growth(entry: Entry) -> dict[str, Any]:
    """What the longest prefix costs, against the shortest, round by round."""
    longest, shortest = (entry.answers[end(entry.answers)] for end in (max, min))
    return {field: _ratio(longest, shortest, field) for field in FIELDS}


def _ratio(over: list[dict[str, Any]], under: list[dict[str, Any]], field: str) -> dict[str, float]:
    return quartiles([left[field] / right[field] for left, right in zip(over, under, strict=True)])


def to_markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = [f"`{report['command']}`", "", report["machine"], "", f"Versions: {_versions(report['contestants'])}", ""]
    bandwidth = show(report["read bandwidth, bytes a second"], 1e-9, 1)
    lines += [f"Memory was read at {bandwidth} GB/s, measured before each turn.", ""]
    lines.append(f"Medians [quartiles] of {report['rounds']} rounds; {report['new_tokens']} new tokens, batch 1.")
    for length in report["prefix_lengths"]:
        lines += ["", f"## Prefix length {length}, prompt of {report['prompt_length']}", "", *_length(report, length)]
    if len(report["prefix_lengths"]) > 1:
        lines += ["", "## What a prefix costs", "", *_growths(report)]
    lines += ["", "## What stands in for the prefix", "", *_about(report["contestants"])]
    return "\n".join(lines + _selection(report["task selection"])) + "\n"


def _length(report: Mapping[str, Any], length: int) -> list[str]:
    token, first = ("a token, ms", "product / this", "its floor, ms", "/ floor"), ("first token, ms", "product / this")
    header = ("", *token, *first, "resident, MB", "equal tokens")
    return markdown_table(header, [_row(found, str(length), len(header)) for found in report["contestants"].values()])


def _row(found: Mapping[str, Any], length: str, width: int) -> list[str]:
    if "reason" in found:
        return [found["label"], f"not measured: {_escape(found['reason'])}", *[""] * (width - 2)]
    figures = found["lengths"][length]
    token, first = ((show(figures[field], 1e3), show(figures[f"{field}, product over this"])) for field in FIELDS)
    floor = show(figures["floor"], 1e3), show(figures["inter_token over floor"])
    resident = f"{figures['resident_bytes'] / 1e6:.0f}"
    return [found["label"], *token, *floor, *first, resident, _agreement(found, figures)]


def _agreement(found: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Rounded weights may choose other tokens in time; float32 may not."""
    equal, tokens = figures["equal_tokens"], figures["tokens"]
    if equal == tokens:
        return "all"
    return f"first {equal} of {tokens}" if found["precision"] != "float32" else f"**MISMATCH after {equal}**"


def _growths(report: Mapping[str, Any]) -> list[str]:
    ends = f"{max(report['prefix_lengths'])} / {min(report['prefix_lengths'])}"
    header = ("", f"a token, prefix {ends}", f"first token, prefix {ends}")
    rows = [
        [found["label"], *(show(found["longest over shortest"][field]) for field in FIELDS)]
        for found in report["contestants"].values()
        if "reason" not in found and found["prefix"] != NONE
    ]
    return markdown_table(header, rows)


def _about(contestants: Mapping[str, Any]) -> list[str]:
    header = ("", "precision", "prefix", "opened in, s", "resident once open, MB")
    rows = [(found["label"], found["precision"], found["prefix"], *_opening(found)) for found in contestants.values()]
    return markdown_table(header, rows)


def _opening(found: Mapping[str, Any]) -> tuple[str, str]:
    if "reason" in found:
        return "—", "—"
    return f"{found['open_seconds']:.2f}", f"{found['resident_bytes'] / 1e6:.0f}"


def _selection(selection: Mapping[str, Any]) -> list[str]:
    if not selection:
        return []
    rows = [(name, *(show(passes[when], 1e3, 3) for when in PASSES)) for name, passes in selection.items()]
    header = ("ms to select", *PASSES)
    return ["", "## Selecting one of 100 tasks", "", *markdown_table(header, rows)]


def _versions(contestants: Mapping[str, Any]) -> str:
    """Each package once; optimum's graph and others run in environments that may differ."""
    found = {f"{name} {number}" for row in contestants.values() for name, number in row.get("versions", {}).items()}
    return ", ".join(sorted(found))


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
