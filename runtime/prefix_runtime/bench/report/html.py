"""A bench as one self-contained HTML page: tables, and charts for light and dark mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from prefix_runtime.bench.measurements import BenchReport, Comparison

from .charts import Chart, selection_chart, setting_charts
from .svg import draw, legend
from .tables import ReportTable, comparison_tables, general_tables, headline, notes, setting_name, setting_tables

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1d2328; --faint: #5d6a74; --rule: #d6dce1;
  --c0: #1b6c8f; --c1: #b4511b; --c2: #6a4a9c; --c3: #4a7a2a; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181b; --text: #e4e9ec; --faint: #9aa7b0; --rule: #343d44;
    --c0: #63bfe0; --c1: #f0a060; --c2: #b89be8; --c3: #98cc68; } }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
ul.facts { list-style: none; padding: 0; margin: 0; color: var(--faint); }
code { font-size: .9em; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; overflow-x: auto; } figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; padding: 0; margin: .2rem 0;
  font-size: .85rem; color: var(--faint); }
.legend i { display: inline-block; width: 1.4rem; margin-right: .4rem; vertical-align: middle;
  border-top: 3px solid var(--colour); }
.legend i.dashed { border-top-style: dashed; }
.legend i.marks { width: .5rem; height: .5rem; border: 2px solid var(--colour); transform: rotate(45deg); }
.legend i.bar { width: .8rem; height: .8rem; border: 0; background: var(--colour); }
svg { display: block; width: 100%; min-width: 25rem; height: auto; font-size: 12px; fill: var(--faint); }
.c0 { --colour: var(--c0); } .c1 { --colour: var(--c1); } .c2 { --colour: var(--c2); } .c3 { --colour: var(--c3); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--faint); }
svg g { stroke: var(--colour); stroke-width: 1.6; } svg polyline { fill: none; }
svg .dashed { stroke-dasharray: 6 4; } svg circle { fill: var(--colour); }
svg path { fill: var(--ground); stroke-width: 2; } svg rect { fill: var(--colour); }
.tables { overflow-x: auto; }
table { border-collapse: collapse; margin: 1.2rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .2rem; }
th, td { padding: .15rem .9rem .15rem 0; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; } thead th { border-bottom: 1px solid var(--rule); color: var(--faint); }
tbody th { font-weight: 400; }
"""


def as_html(report: BenchReport, comparison: Comparison | None = None) -> str:
    """A report, with an optional comparison, as an HTML page."""
    title = f"Bench of {report.subject.label}"
    parts = [*_introduction(report, title, comparison), *_settings(report, comparison), *_general(report, comparison)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _introduction(report: BenchReport, title: str, comparison: Comparison | None) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    if comparison:
        yield f"<p>Against {escape(comparison.labels[1])}.</p>"
    yield _list([*headline(report), report.created], "facts")
    if report.command:
        yield f"<p><code>{escape(report.command)}</code></p>"
    yield _list(notes(report, comparison), "notes")


def _settings(report: BenchReport, comparison: Comparison | None) -> Iterator[str]:
    compared = comparison_tables(comparison) if comparison else []
    for number, setting in enumerate(report.settings):
        name = setting_name(setting)
        yield f"<h2>{escape(name.capitalize())}</h2>"
        yield _figures(setting_charts(report, setting, comparison), f"s{number}")
        own = [table for table in compared if table.title.startswith(f"{name}:")]
        yield _tables([*own, *setting_tables(report, setting)])


def _general(report: BenchReport, comparison: Comparison | None) -> Iterator[str]:
    yield "<h2>Tasks and opening</h2>"
    chart = selection_chart(report)
    yield _figures([chart] if chart else [], "tasks")
    yield _tables(general_tables(report))
    if comparison:
        other = comparison.against
        yield f"<h2>{escape(comparison.labels[1])}</h2>"
        yield _list(headline(other), "facts")
        own = [table for setting in other.settings for table in setting_tables(other, setting)]
        yield _tables([*own, *general_tables(other)])


def _figures(charts: Sequence[Chart], name: str) -> str:
    figures = []
    for number, chart in enumerate(charts):
        items = "".join(f'<li><i class="{kind}"></i>{escape(shown)}</li>' for shown, kind in legend(chart))
        caption = f"<figcaption>{escape(chart.title)}</figcaption>"
        figures.append(f'<figure>{caption}<ul class="legend">{items}</ul>\n{draw(chart, f"{name}-{number}")}</figure>')
    return f'<div class="charts">\n{"".join(figures)}\n</div>' if figures else ""


def _tables(tables: Sequence[ReportTable]) -> str:
    return "\n".join(f'<div class="tables">{_table(table)}</div>' for table in tables)


def _table(table: ReportTable) -> str:
    header = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.header)
    rows = "\n".join(_row(row) for row in table.rows)
    caption = f"<caption>{escape(table.title)}</caption>"
    return f"<table>{caption}<thead><tr>{header}</tr></thead>\n<tbody>{rows}</tbody></table>"


def _row(row: Sequence[str]) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in row[1:])
    return f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>'


def _list(lines: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
