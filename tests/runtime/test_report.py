"""Showing: the figures are those of the report, the page stands alone and is well-formed, the picture is one."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from prefix_runtime import BenchError
from prefix_runtime.bench.measurements import Comparison, Switch
from prefix_runtime.bench.report.charts import BarChart, LineChart, selection_chart, setting_charts, ticks
from prefix_runtime.bench.report.html import as_html
from prefix_runtime.bench.report.png import as_png
from prefix_runtime.bench.report.svg import draw
from prefix_runtime.bench.report.tables import WIDTH, as_text, comparison_tables, milliseconds, notes, tables
from tests.runtime.conftest import cell, report_of


@pytest.fixture
def report():
    rows = [cell(length, *[0.05, 0.052, 0.06] * 2, prompt=32) for length in (0, 5, 200)]
    task = cell(20, *[0.051, 0.053, 0.061] * 2, prompt=32, task="headline")
    return report_of(*rows, task, cell(0, *[0.1] * 6, prompt=64))


@pytest.fixture
def comparison(report):
    quick = replace(report.subject, precision="int8", weight_bytes=250_000)
    cells = tuple(cell(each.prefix_length, *[0.02] * 6, prompt=32, task=each.task) for each in report.cells[:4])
    return Comparison(report, replace(report, subject=quick, cells=cells), interleaved=True)


def table_of(report, title):
    (found,) = [table for table in tables(report) if table.title == title]
    return {row[0]: dict(zip(found.header[1:], row[1:], strict=True)) for row in found.rows}


class TestText:
    def test_figures_are_milliseconds_with_their_quartiles(self, report):
        row = table_of(report, "prompt 32, batch 1: latency")["5"]
        assert row["ms a token"] == "52.00 [50.50, 58.00]"
        assert row["ms to first token"] == "104.0 [101.0, 116.0]"

    def test_the_floor_stands_beside_them(self, report):
        found = next(table for table in tables(report) if table.title == "prompt 32, batch 1: latency")
        (row,) = [row for row in found.rows if row[0] == "200"]
        # 1 MB of weights at 1 GB/s, and 200 (and 32, and 4) positions of 400 bytes.
        assert (row[2], row[4]) == ("1.08", "1.09")

    def test_the_overhead_has_its_interval(self, report):
        found = table_of(report, "prompt 32, batch 1: overhead against prefix 0")
        assert list(found) == ["5", "200", "headline (20)"]
        assert found["5"]["a token, 95 % interval"] == "+0.0 % [+0.0, +0.0]"
        assert found["headline (20)"]["a token, 95 % interval"] == "+1.9 % [+1.7, +2.0]"

    def test_the_parts_of_a_step_make_up_the_step(self, report):
        row = table_of(report, "prompt 32, batch 1: breakdown in ms")["200"]
        parts = [float(row[name]) for name in ("a token: weights", "keys, values", "rest")]
        assert sum(parts) == pytest.approx(52.0, abs=0.01)

    def test_opening_and_selection_are_told(self, report):
        assert table_of(report, "selecting a task")["5"] == {
            "ms cold, first request": "2.00 [2.00, 2.00]",
            "ms warm, later requests": "0.100 [0.100, 0.100]",
        }
        title = "opening the bundle and running a row, each in a fresh process"
        assert list(table_of(report, title)["0, prompt 32, batch 1"].values()) == [
            "0.10", "1.50", "10", "20", "unknown",
        ]  # fmt: skip

    def test_it_fits_100_columns_also_with_long_names(self, report):
        named = replace(report.cells[3], task="a-task-of-a-very-long-name-that-goes-on-and-on-and-on-and-on")
        text = as_text(replace(report, cells=(*report.cells[:3], named)))
        tables_only = [line for line in text.splitlines() if "  " in line or "─" in line]
        assert max(map(len, tables_only)) <= WIDTH
        assert "…" in text

    def test_what_was_not_measured_is_said(self, report):
        assert "not measured: prefix 9: leaves no room" in as_text(report)

    def test_without_a_prefix_0_there_is_no_overhead_and_it_says_so(self):
        lonely = report_of(cell(1, 0.1), cell(5, 0.1))
        assert "overhead against" not in as_text(lonely)
        assert "no overhead: there is no row of prefix 0 beside another" in notes(lonely)

    def test_one_row_needs_no_excuse(self):
        assert not [line for line in notes(report_of(cell(5, 0.1))) if "overhead" in line]

    def test_a_step_that_beats_the_floor_is_explained(self):
        assert any("faster than the floor" in line for line in notes(report_of(cell(0, 1e-6))))
        assert not any("faster than the floor" in line for line in notes(report_of(cell(0, 1.0))))

    def test_two_reports_stand_side_by_side(self, comparison):
        found = {table.title: table for table in comparison_tables(comparison)}
        table = found["prompt 32, batch 1: A against B, a token"]
        assert table.rows[0] == ("0", "52.00 [50.50, 58.00]", "20.00 [20.00, 20.00]", "2.600 [2.500, 3.000]")
        assert not any("prompt 64" in title for title in found)
        said = notes(comparison.report, comparison)
        assert {"A: a-model fp32", "B: a-model int8", "not compared: 1 rows that B does not have"} <= set(said)

    def test_a_comparison_that_was_not_interleaved_says_so(self, comparison):
        apart = replace(comparison, interleaved=False)
        assert any("not interleaved" in line for line in notes(apart.report, apart))
        assert not any("not interleaved" in line for line in notes(comparison.report, comparison))
        assert comparison_tables(apart)[0].rows[0][3] == "2.600"

    @pytest.mark.parametrize(
        ("change", "labels"),
        [
            ({"precision": "int8"}, ("a-model fp32", "a-model int8")),
            ({"cache": "fp16"}, ("a-model fp32", "a-model fp32, fp16 keys and values")),
            ({"name": "other"}, ("bundle, a-model fp32", "other, a-model fp32")),
            ({}, ("a-model fp32, this run", "a-model fp32, the other")),
        ],
    )
    def test_the_names_of_two_reports_differ(self, report, change, labels):
        other = replace(report, subject=replace(report.subject, **change))
        assert Comparison(report, other, interleaved=False).labels == labels

    @pytest.mark.parametrize(
        ("seconds", "shown"), [(1.23456, "1234.6"), (0.0123456, "12.35"), (0.00012345, "0.123"), (0, "0.000")]
    )
    def test_milliseconds_have_about_four_digits(self, seconds, shown):
        assert milliseconds(seconds) == shown


class TestCharts:
    def test_the_latency_is_drawn_with_its_floor(self, report):
        chart = setting_charts(report, (32, 1))[0]
        assert [series.name for series in chart.series] == ["random prefixes", "tasks of the bundle", "floor"]
        points = chart.series[0].points
        assert [(point.x, point.y) for point in points] == [(0, 52), (5, 52), (200, 52)]
        assert (points[0].low, points[0].high) == (pytest.approx(50.5), pytest.approx(58))
        assert [point.x for point in chart.series[2].points] == [0, 5, 20, 200]

    def test_a_single_length_has_no_overhead_to_draw(self, report):
        assert not [chart for chart in setting_charts(report, (64, 1)) if "Overhead" in chart.title]

    def test_the_overhead_is_drawn_of_random_prefixes_and_of_tasks(self, report):
        (chart,) = [chart for chart in setting_charts(report, (32, 1)) if "Overhead" in chart.title]
        drawn = {
            series.name: (series.colour, series.style, [point.x for point in series.points]) for series in chart.series
        }
        assert drawn == {
            "a token": (0, "line", [5, 200]),
            "a token, tasks of the bundle": (0, "marks", [20]),
            "to the first token": (1, "line", [5, 200]),
            "to the first token, tasks of the bundle": (1, "marks", [20]),
        }
        assert chart.series[1].points[0].text == "prefix headline (20): +1.9 % [+1.7, +2.0]"

    def test_two_reports_overheads_are_of_four_colours(self, comparison):
        (chart,) = [
            chart for chart in setting_charts(comparison.report, (32, 1), comparison) if "Overhead" in chart.title
        ]
        assert sorted({(series.colour, series.name.rpartition(", ")[2]) for series in chart.series}) == [
            (0, "a-model fp32"), (1, "a-model fp32"), (2, "a-model int8"), (3, "a-model int8"),
        ]  # fmt: skip

    def test_a_bar_is_never_negative(self):
        fast = report_of(cell(0, 1e-6))
        bars = [chart for chart in setting_charts(fast, (10, 1)) if isinstance(chart, BarChart)]
        assert all(value >= 0 for chart in bars for _, values in chart.parts for value in values)

    def test_without_prefixes_there_is_no_selection(self, report):
        assert selection_chart(replace(report, switches=())) is None

    def test_selection_is_drawn_of_random_prefixes_and_of_tasks(self, report):
        switches = (Switch(None, 5, (0.002,), (1e-4,)), Switch("headline", 20, (0.003,), (2e-4,)))
        chart = selection_chart(replace(report, switches=switches))
        assert isinstance(chart, LineChart)
        assert [
            (series.colour, series.style, [(point.x, point.y) for point in series.points]) for series in chart.series
        ] == [
            (0, "line", [(5, 2.0)]),
            (0, "marks", [(20, 3.0)]),
            (1, "line", [(5, pytest.approx(0.1))]),
            (1, "marks", [(20, pytest.approx(0.2))]),
        ]

    @pytest.mark.parametrize("ends", [(0, 1), (0, 97), (-3.2, 5.1), (0, 0.0013), (0, 0), (0, 1e9), (-1, 0)])
    def test_ticks_reach_around_what_is_drawn(self, ends):
        found = ticks(*ends)
        assert found[0] <= ends[0]
        assert found[-1] >= ends[1]
        assert 2 <= len(found) <= 8

    def test_nothing_is_drawn_outside_of_the_picture(self, report):
        for number, chart in enumerate(setting_charts(report, (32, 1))):
            root = ET.fromstring(draw(chart, f"c{number}"))
            _, _, width, height = map(float, root.get("viewBox").split())
            for element in root.iter():
                for name in ("x", "x1", "x2", "cx"):
                    assert 0 <= float(element.get(name, 0)) <= width
                for name in ("y", "y1", "y2", "cy"):
                    assert 0 <= float(element.get(name, 0)) <= height

    def test_each_point_tells_its_figure(self, report):
        assert "prefix 200: 52.00 ms [50.50, 58.00]" in draw(setting_charts(report, (32, 1))[0], "c")


class Collector(HTMLParser):
    """What a page refers to."""

    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]


class TestPage:
    def test_it_is_well_formed_and_has_every_figure(self, report, comparison):
        page = as_html(report, comparison)
        assert page.startswith("<!DOCTYPE html>")
        root = ET.fromstring(page.partition("\n")[2])
        cells = {"".join(each.itertext()) for each in root.iter() if each.tag in ("td", "th")}
        for table in (*tables(report), *comparison_tables(comparison)):
            assert {text for row in table.rows for text in row} <= cells

    def test_it_needs_nothing_else(self, report):
        page = Collector()
        page.feed(as_html(report))
        assert page.links == []
        assert not {"script", "link", "img", "iframe"} & set(page.tags)
        assert "url(" not in as_html(report)

    def test_it_has_colours_for_light_and_for_dark(self, report):
        page = as_html(report)
        light, dark = page.split("prefers-color-scheme: dark")
        for name in set(re.findall(r"var\((--(?!colour)\w+)\)", page)):
            assert f"{name}:" in light
            assert f"{name}:" in dark.partition("}")[0]

    def test_every_plot_has_a_title_and_a_description_of_its_own(self, report, comparison):
        page = as_html(report, comparison)
        names = [name for each in re.findall(r'aria-labelledby="([^"]+)"', page) for name in each.split()]
        assert len(names) == len(set(names)) == 2 * page.count("<svg")
        assert page.count("<svg") >= 10
        assert all(page.count(f'id="{name}"') == 1 for name in names)

    def test_names_cannot_break_out(self, report):
        evil = "<script>\"&'</script>"
        rows = (*report.cells[:3], replace(report.cells[3], task=evil))
        page = as_html(replace(report, command=evil, skipped=(evil,), cells=rows))
        assert "<script" not in page
        ET.fromstring(page.partition("\n")[2])

    @pytest.mark.parametrize("lengths", [(0,), (7,), (0, 7)])
    def test_few_rows_are_a_page_too(self, lengths):
        ET.fromstring(as_html(report_of(*(cell(each, 0.1) for each in lengths))).partition("\n")[2])


class TestPicture:
    def test_it_is_a_png_of_all_charts(self, report, comparison):
        alone, both = as_png(report), as_png(report, comparison)
        assert alone[:8] == both[:8] == b"\x89PNG\r\n\x1a\n"
        height = [int.from_bytes(content[20:24], "big") for content in (alone, both)]
        assert min(height) > 1500  # ten and twelve panels, three a row

    def test_one_row_is_a_picture_too(self):
        assert as_png(replace(report_of(cell(7, 0.1)), switches=()))[:4] == b"\x89PNG"

    def test_without_the_library_it_says_what_to_install(self, report, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(BenchError, match=re.escape("pip install 'prefix-runtime[report]'")):
            as_png(report)

    def test_everything_else_does_without_the_library(self, python):
        code = (
            "import sys; sys.modules['matplotlib'] = None\n"
            "import prefix_runtime.bench.report.html, prefix_runtime.bench.report.png"
        )
        assert python(code).returncode == 0
