"""Measuring: every row once a round, what does not fit is said, what follows from it is what it is defined as."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_runtime import BenchError, Bundle, Engine, ProviderError, UnknownTaskError, machine
from prefix_runtime.backends.onnxruntime.automatic_packing import discard_packed, pack_for_good
from prefix_runtime.bench import bandwidth
from prefix_runtime.bench import file as bench_file
from prefix_runtime.bench import plan as bench_plan
from prefix_runtime.bench import run as bench_module
from prefix_runtime.bench.file import from_json, summary, to_csv, to_json
from prefix_runtime.bench.fresh_process import run_in_fresh_process
from prefix_runtime.bench.inputs import random_prefix
from prefix_runtime.bench.measurements import BenchReport, Comparison, Sample, paired_ratio
from prefix_runtime.bench.report.tables import as_text
from prefix_runtime.bench.request import BenchRequest
from prefix_runtime.bench.run import bench, bench_together
from tests.runtime.conftest import cell, report_of, sample
from tests.runtime.host_device import HostDevice

SMALL = BenchRequest(prefix_lengths=(0, 5), new_tokens=3, rounds=2, threads=1)
ROW = bench_plan.BenchRow(None, 3, prompt_length=4, batch_size=1)


@pytest.fixture(autouse=True)
def _little_to_read(monkeypatch):
    monkeypatch.setattr(bandwidth, "MOST_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def measured(shared_bundle):
    """A report of the shared bundle, with what the listener was told."""
    told = []
    request = BenchRequest((0, 5, 400), None, (4, 312), (2, 1), new_tokens=4, rounds=2, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandwidth, "MOST_BYTES", 1 << 20)
        report = bench(shared_bundle, request, lambda *step: told.append(step))
    return report, told


class TestRequest:
    def test_lists_are_sorted_and_each_value_is_kept_once(self):
        request = BenchRequest((5, 0, 5), ("b", "a", "b"), (3, 3), (2, 1))
        assert (request.prefix_lengths, request.tasks) == ((0, 5), ("b", "a"))
        assert (request.prompt_lengths, request.batch_sizes) == ((3,), (1, 2))

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("prefix_lengths", ()),
            ("prefix_lengths", (-1,)),
            ("prefix_lengths", (True,)),
            ("prompt_lengths", (0,)),
            ("prompt_lengths", ()),
            ("batch_sizes", (0,)),
            ("batch_sizes", (1 << 20,)),
            ("new_tokens", 1),
            ("rounds", 0),
            ("rounds", 2.5),
        ],
    )
    def test_nonsense_is_refused_by_its_name(self, field, value):
        with pytest.raises(BenchError, match=rf"^{field}: expected .*, found "):
            BenchRequest(**{field: value})


class TestRounds:
    def test_every_row_runs_once_a_round_in_another_order_each_time(self, measured):
        report, told = measured
        texts = [text for *_, text in told if ": " in text]
        rounds = {}
        for text in texts:
            name, row = text.split(": ", 1)
            rounds.setdefault(name, []).append(row)
        assert list(rounds) == ["warming up", "round 1 of 2", "round 2 of 2"]
        orders = list(rounds.values())
        assert all(Counter(order) == Counter(orders[0]) for order in orders)
        assert max(Counter(orders[0]).values()) == 1
        assert len({tuple(order) for order in orders}) == 3
        assert len(orders[0]) == len(report.cells) + len(report.switches) + 1

    def test_the_steps_are_counted_from_none_to_all(self, measured):
        _, told = measured
        assert [done for done, *_ in told] == list(range(len(told)))
        assert {total for _, total, _ in told} == {len(told)}

    def test_the_round_that_warms_up_is_left_out(self, measured):
        report, _ = measured
        assert {len(each.samples) for each in report.cells} == {2}
        assert {len(times) for each in report.switches for times in (each.cold, each.warm)} == {2}
        assert len(report.bandwidth) == 2

    def test_all_that_fits_is_measured(self, measured):
        report, _ = measured
        rows = [(None, 0), (None, 5), ("p20", 20), ("p3", 3)]
        expected = [(*row, 4, batch) for batch in (1, 2) for row in rows]
        fitting = [(None, 0, 312, 1), ("p3", 3, 312, 1), (None, 0, 312, 2), ("p3", 3, 312, 2)]
        assert sorted(map(str, (each.key for each in report.cells))) == sorted(map(str, expected + fitting))
        assert [(each.task, each.prefix_length) for each in report.switches] == rows[1:]

    def test_every_row_has_a_process_of_its_own_and_its_memory(self, measured):
        report, _ = measured
        assert [each.key for each in report.openings] == [each.key for each in report.cells]
        assert all(report.peak_bytes(each) > 1 << 20 for each in report.cells)

    def test_what_does_not_fit_is_said_once_with_the_reason(self, measured):
        report, _ = measured
        assert report.skipped == (
            "prefix 400: leaves no room for text in 320 positions",
            "prefix 5, prompt 312: with 4 new tokens it does not fit 320 positions",
            "task p20, prompt 312: with 4 new tokens it does not fit 320 positions",
        )

    def test_times_are_times(self, measured):
        report, _ = measured
        for each in (each for row in report.cells for each in row.samples):
            assert 0 < each.task_selection < each.time_to_first_token
            assert 0 < each.prefill < each.time_to_first_token
            assert each.inter_token_latency > 0
        assert all(seconds > 0 for each in report.switches for seconds in (*each.cold, *each.warm))

    def test_tokens_a_second_are_those_of_the_whole_batch(self, measured):
        report, _ = measured
        for each in report.cells:
            for one in each.samples:
                assert one.tokens_per_second * one.time_to_first_token < 4 * each.batch_size

    def test_end_tokens_do_not_cut_a_generation_short(self, monkeypatch, shared_bundle):
        seen = []
        original = bench_module._generate

        def spy(engine, task, prompts, new_tokens):
            results = engine.generate(token_ids=prompts, task=task, max_new_tokens=new_tokens, ignore_end=True)
            seen.extend(len(result.token_ids) for result in results)
            return original(engine, task, prompts, new_tokens)

        monkeypatch.setattr(bench_module, "_generate", spy)
        bench(shared_bundle, replace(SMALL, new_tokens=20, rounds=1))
        assert set(seen) == {20}

    def test_the_bundle_is_left_as_it_was(self, bundle):
        before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
        bench(bundle, SMALL)
        assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before

    def test_two_bundles_share_their_rounds(self, shared_bundle, bundle):
        told = []
        first, second = bench_together([shared_bundle, bundle], SMALL, lambda *step: told.append(step[2]))
        assert first.bandwidth == second.bandwidth
        assert [each.key for each in first.cells] == [each.key for each in second.cells]
        assert first.cells != second.cells
        assert max(Counter(told).values()) == 2

    def test_on_a_gpu_its_name_comes_first_and_its_memory_is_copied(self, shared_bundle, monkeypatch):
        device = HostDevice()
        monkeypatch.setattr(Engine, "device", device)
        report = bench(shared_bundle, SMALL)
        assert next(iter(report.machine.items())) == ("gpu", device.name)
        assert as_text(report).splitlines()[1].startswith(f"{device.name}, {machine.processor_name()}")
        assert device.stream.copied["copy"]
        assert from_json(to_json(report), "a report").machine == report.machine

    def test_a_graph_that_was_kept_is_measured_and_said_to_be(self, bundle, monkeypatch, tmp_path):
        monkeypatch.setenv("PREFIX_RUNTIME_CACHE", str(tmp_path / "cache"))
        opened = Bundle.open(bundle)
        pack_for_good(opened)
        assert as_text(bench(bundle, SMALL)).splitlines()[1].partition(";")[0].endswith(", graph kept as it was packed")
        discard_packed(opened)
        assert "kept" not in as_text(bench(bundle, SMALL)).splitlines()[1]

    def test_nothing_that_names_a_machine_or_a_person_is_kept(self, measured, shared_bundle):
        text = to_json(measured[0])
        assert str(shared_bundle.parent) not in text
        assert machine.platform.node() not in re.findall(r"[\w.-]+", text)


class TestChoices:
    def test_tasks_that_are_named_are_the_only_ones(self, shared_bundle):
        report = bench(shared_bundle, replace(SMALL, tasks=("p3",)))
        assert [each.label for each in report.cells] == ["0", "5", "p3"]

    def test_a_task_that_is_not_there_is_refused(self, shared_bundle):
        with pytest.raises(UnknownTaskError, match="tasks here: p20, p3"):
            bench(shared_bundle, replace(SMALL, tasks=("nope",)))

    def test_of_many_tasks_the_first_are_measured_and_the_others_counted(self, bundle, make_prefix, monkeypatch):
        monkeypatch.setattr(bench_plan, "MOST_TASKS", 3)
        opened = Bundle.open(bundle)
        for name in ("a", "b", "z"):
            opened.add_task(name, make_prefix(2))
        report = bench(bundle, SMALL)
        assert [each.task for each in report.cells if each.task] == ["a", "b", "p20"]
        assert report.skipped == ("2 more tasks: only the first 3 of a bundle are measured, unless you name others",)

    def test_a_bundle_without_tasks_and_tokenizer_is_measured(self, bundle):
        opened = Bundle.open(bundle)
        for name in opened.tasks:
            opened.remove_task(name)
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["files"] = [entry for entry in manifest["files"] if not entry["path"].startswith("tokenizer")]
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        assert [each.label for each in bench(bundle, SMALL).cells] == ["0", "5"]

    def test_tasks_whose_names_are_ours_do_not_get_into_the_way(self, bundle, make_prefix):
        opened = Bundle.open(bundle)
        opened.add_task("Prefix-5", make_prefix(2))
        opened.add_task("selected", make_prefix(2))
        assert len(bench(bundle, SMALL).cells) == 6

    def test_more_rows_than_an_engine_decodes_at_once_by_default(self, shared_bundle):
        report = bench(shared_bundle, replace(SMALL, prefix_lengths=(0,), tasks=("p3",), batch_sizes=(11,)))
        assert {each.batch_size for each in report.cells} == {11}

    def test_a_prefix_that_begins_text_at_0_leaves_its_room(self, bundle, make_prefix):
        Bundle.open(bundle).add_task("base0", make_prefix(100, position_base=0))
        report = bench(bundle, replace(SMALL, tasks=("base0",), prompt_lengths=(217, 218)))
        assert [each.prompt_length for each in report.cells if each.task] == [217]

    def test_when_nothing_fits_it_says_why(self, shared_bundle):
        with pytest.raises(BenchError, match=r"expected something that fits the bundle, found .*320 positions"):
            bench(shared_bundle, replace(SMALL, prompt_lengths=(10_000,)))

    def test_a_provider_that_is_none_is_refused(self, shared_bundle):
        with pytest.raises((ProviderError, BenchError), match="provider: expected one of cpu"):
            bench(shared_bundle, replace(SMALL, provider="tpu"))

    def test_a_random_prefix_fits_and_is_the_same_every_time(self, shared_bundle):
        bundle = Bundle.open(shared_bundle)
        assert random_prefix(bundle, 7) == random_prefix(bundle, 7)
        assert random_prefix(bundle, 7).prefix_length == random_prefix(bundle, 7).position_base == 7


class TestMachine:
    def test_the_bandwidth_is_bytes_over_the_best_pass(self, monkeypatch):
        # Four passes of 4, 2, 8 and 5 seconds by a clock of ours.
        clock = itertools.chain.from_iterable([(0, 4), (0, 2), (0, 8), (0, 5)])
        probe = bandwidth.BandwidthProbe(threads=3)
        monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(clock))
        assert probe.measure() == (1 << 20) / 2

    def test_little_memory_is_not_filled(self, monkeypatch):
        monkeypatch.setattr(bandwidth, "MOST_BYTES", 1 << 30)
        monkeypatch.setattr(bandwidth, "free_memory", lambda: 64 << 20)
        assert sum(part.nbytes for part in bandwidth.BandwidthProbe(1)._slices) == 16 << 20

    def test_memory_is_read_where_the_system_tells(self, monkeypatch, tmp_path):
        (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
        monkeypatch.setattr(machine, "_PROCESS", tmp_path / "status")
        assert (machine.peak_memory(), machine.resident_memory()) == (2048 * 1024, 1024 * 1024)

    def test_elsewhere_the_peak_is_the_resource_modules(self, monkeypatch, tmp_path):
        monkeypatch.setattr(machine, "_PROCESS", tmp_path / "missing")
        assert machine.resident_memory() is None
        assert machine.peak_memory() > 1 << 20

    def test_a_fresh_process_measures_its_opening(self, shared_bundle):
        opening = run_in_fresh_process(shared_bundle, ROW, SMALL)
        assert opening.key == (None, 3, 4, 1)
        assert opening.import_seconds > 0
        assert opening.open_seconds > 0
        assert 0 < opening.opened_bytes <= opening.generated_bytes

    def test_a_parents_memory_is_not_counted(self, shared_bundle):
        ballast = np.ones(200 << 17)
        opening = run_in_fresh_process(shared_bundle, ROW, SMALL)
        assert opening.generated_bytes < ballast.nbytes

    def test_a_process_that_fails_is_told_in_one_line(self, tmp_path):
        with pytest.raises(BenchError, match=r"fresh process to run prefix 3, .*, found .*expected a bundle"):
            run_in_fresh_process(tmp_path, ROW, SMALL)


class TestFigures:
    def test_the_overhead_does_not_see_a_machine_that_drifts(self):
        drift = [1.0, 3.0, 0.5, 10.0, 2.0, 4.0]
        report = report_of(cell(0, *drift), cell(5, *(1.1 * value for value in drift)))
        ratio = report.overhead(report.cells[1], "inter_token_latency")
        assert ratio.median == pytest.approx(1.1)
        assert ratio.interval == pytest.approx((1.1, 1.1))

    def test_the_bare_model_has_no_overhead_and_without_it_nothing_has(self):
        report = report_of(cell(0, 1, 2), cell(5, 1, 2))
        assert report.overhead(report.cells[0], "inter_token_latency") is None
        report = report_of(cell(1, 1, 2), cell(5, 1, 2))
        assert all(report.overhead(each, "inter_token_latency") is None for each in report.cells)

    def test_each_setting_has_its_own_bare_model(self):
        report = report_of(cell(0, 1.0), cell(0, 2.0, prompt=20), cell(5, 4.0), cell(5, 4.0, prompt=20))
        assert [report.overhead(each, "inter_token_latency").median for each in report.cells[2:]] == [4.0, 2.0]

    @pytest.mark.parametrize(("rounds", "place"), [(6, 0), (8, 0), (9, 1), (12, 2), (15, 3), (30, 9)])
    def test_the_interval_lies_between_the_ratios_that_the_sign_test_gives(self, rounds, place):
        # Places from tables of that test, e.g. Conover, "Practical Nonparametric Statistics", table A3.
        ratios = [float(number) for number in np.random.default_rng(0).permutation(rounds)]
        assert paired_ratio(ratios, [1.0] * rounds).interval == (place, rounds - 1 - place)

    @pytest.mark.parametrize("rounds", [6, 7, 20])
    def test_the_interval_holds_the_median_nineteen_times_of_twenty(self, rounds):
        random = np.random.default_rng(1)
        found = [paired_ratio(random.lognormal(size=rounds), np.ones(rounds)).interval for _ in range(2000)]
        assert np.mean([low <= 1 <= high for low, high in found]) >= 0.94

    @pytest.mark.parametrize("rounds", [1, 2, 5])
    def test_few_rounds_make_no_interval(self, rounds):
        ratio = paired_ratio([2.0] * rounds, [1.0] * rounds)
        assert (ratio.median, ratio.interval) == (2.0, None)

    def test_the_floor_reads_the_weights_once_and_each_rows_keys_and_values(self):
        report = report_of(cell(20, 1.0, prompt=10, batch=3))
        floor = report.step_floor(report.cells[0])
        assert floor.weights == pytest.approx(1_000_000 / 1e9)
        assert floor.key_values == pytest.approx(3 * (20 + 10 + 4) * 100 * 4 / 1e9)
        first = report.first_token_floor(report.cells[0])
        assert first.key_values == pytest.approx(3 * 20 * 100 * 4 / 1e9)
        most = report.most_tokens_per_second(report.cells[0])
        assert most == pytest.approx(3 * 8 / (first.seconds + 7 * floor.seconds))

    @pytest.mark.parametrize(("cache", "size"), [("fp32", 4), ("fp16", 2), ("int8", 1)])
    def test_smaller_keys_and_values_are_read_faster(self, cache, size):
        subject = replace(report_of(cell(0, 1.0)).subject, cache=cache)
        assert subject.key_value_bytes(10) == 10 * 100 * size

    def test_interleaved_reports_are_compared_round_by_round_and_others_by_medians(self):
        first, second = report_of(cell(0, 1.0, 10.0, 4.0)), report_of(cell(0, 2.0, 5.0, 4.0))
        pair = (first.cells[0], second.cells[0], "inter_token_latency")
        assert Comparison(first, second, interleaved=True).ratio(*pair).median == 1.0
        apart = Comparison(first, second, interleaved=False).ratio(*pair)
        assert (apart.median, apart.interval) == (1.0, None)

    def test_rows_that_only_one_report_has_are_not_compared(self):
        first, second = report_of(cell(0, 1.0), cell(5, 1.0)), report_of(cell(5, 2.0), cell(9, 1.0))
        assert [pair[0].label for pair in Comparison(first, second, interleaved=False).cells] == ["5"]


TIMES = st.floats(1e-9, 1e6)
PRINTED = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20)


@st.composite
def reports(draw):
    rounds = draw(st.integers(1, 3))
    many = st.lists(TIMES, min_size=rounds, max_size=rounds)
    rows = draw(st.lists(st.tuples(st.none() | PRINTED, st.integers(0, 9)), min_size=1, unique=True))
    cells = [replace(cell(length, *draw(many)), task=task) for task, length in rows]
    report = report_of(*cells)
    return replace(report, bandwidth=tuple(draw(many)), skipped=tuple(draw(st.lists(PRINTED))), command=draw(PRINTED))


class TestFiles:
    @settings(max_examples=30, deadline=None)
    @given(reports())
    def test_json_gives_the_same_report_again(self, report):
        assert from_json(to_json(report, against=report), "x") == report

    def test_a_real_report_too(self, measured):
        assert from_json(to_json(measured[0]), "x") == measured[0]

    def test_json_knows_no_nan(self, measured):
        json.loads(to_json(measured[0]), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    def test_csv_has_a_line_a_row_with_the_figures_of_the_report(self, measured):
        report, _ = measured
        header, *lines = to_csv([report, report]).splitlines()
        assert len(lines) == 2 * len(report.cells)
        row = dict(zip(header.split(","), lines[0].split(","), strict=True))
        assert float(row["inter_token_latency"]) == report.cells[0].quartiles("inter_token_latency").median
        assert (row["task"], row["prefix_length"], row["inter_token_latency_ratio"]) == ("", "0", "")
        assert (row["task_switch_cold"], row["task_switch_warm"]) == ("", "")
        assert float(row["bytes_per_second"]) == report.bytes_per_second
        assert float(row["open_seconds"]) > 0
        switches = {(each.task, each.prefix_length): each for each in report.switches}
        assert switches
        for found in summary(report):
            switch = switches.get((found["task"], found["prefix_length"]))
            assert found["task_switch_warm"] == (np.median(switch.warm) if switch else None)
            assert found["task_switch_cold"] == (np.median(switch.cold) if switch else None)

    def test_the_summary_has_the_overhead(self):
        row = summary(report_of(cell(0, *[1.0] * 6), cell(5, *[2.0] * 6)))[1]
        names = ("inter_token_latency_ratio", "inter_token_latency_ratio_low", "inter_token_latency_ratio_high")
        assert [row[name] for name in names] == [2.0, 2.0, 2.0]

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"format": 1}', "[" * 100_000, '{"a": NaN}'])
    def test_what_is_no_report_is_refused(self, text):
        with pytest.raises(BenchError, match=r"^x: expected a report that `bench --json` wrote"):
            from_json(text, "x")

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ("format_version", 3, "expected format version 2, found 3; update prefix-runtime"),
            ("format_version", 1, "expected format version 2, found 1; measure again"),
            ("format_version", None, "format_version: expected int"),
            ("format_version", True, "format_version: expected int"),
            ("cells", [], "cells: expected at least one"),
            ("cells", {}, "cells: expected list"),
            ("cells.0", 1, r"cells\[0\]: expected dict"),
            ("cells.0.prefix_length", -1, "prefix_length: expected int"),
            ("cells.0.prefix_length", 2**70, "prefix_length: expected int"),
            ("cells.0.samples", [], "cells: expected a sample for each of 2 rounds, found 0"),
            ("cells.0.samples.0.inter_token_latency", 0, "above 0, found 0"),
            ("cells.0.samples.0.inter_token_latency", -1, "expected 0 or a number from 1e-12 to 1e[+]15"),
            ("cells.0.samples.0.inter_token_latency", "1", "expected 0 or a number from 1e-12 to 1e[+]15"),
            ("bandwidth.0", 1e-320, "expected 0 or a number from 1e-12 to 1e[+]15"),
            ("cells.0.samples.0.inter_token_latency", 10**400, "expected 0 or a number from 1e-12 to 1e[+]15"),
            ("cells.0.samples.0.task_selection", 9.0, "expected a task_selection of at most the time_to_first_token"),
            ("bandwidth", [1e9], "bandwidth: expected a sample for each of 2 rounds, found 1"),
            ("bandwidth", [0, 1], "above 0, found 0"),
            ("subject.cache", "fp8", "cache: expected one of fp32, fp16, bf16, int8, found 'fp8'"),
            ("subject.weight_bytes", 0, "above 0, found 0"),
            ("request.rounds", 0, "rounds: expected whole numbers from 1"),
            ("request.prefix_lengths", [], "prefix_lengths: expected at least one, found none"),
            ("switches.0.warm", [1], "switches: expected a sample for each of 2 rounds, found 1"),
            ("machine", {"processor": 1}, "machine.processor: expected str"),
            ("openings.0.open_seconds", None, "open_seconds: expected 0 or a number"),
            ("command", None, "command: expected str"),
            ("command", "\x1b[31m", "command: expected at most 10000 characters, no control ones"),
            ("subject.model", "\ud800", "model: expected at most 10000 characters, no control ones"),
            ("subject.model", "x" * 10_001, "model: expected at most 10000 characters, no control ones"),
        ],
    )
    def test_what_is_wrong_with_a_report_is_named(self, path, value, message):
        content = json.loads(to_json(report_of(cell(0, 1.0, 2.0))))
        *parents, last = path.split(".")
        place = content
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        place[int(last) if last.isdigit() else last] = value
        with pytest.raises(BenchError, match=message) as error:
            from_json(json.dumps(content), "there/x.json")
        assert str(error.value).startswith("there/x.json: ")

    @pytest.mark.parametrize("name", [*BenchReport.__dataclass_fields__])
    def test_every_field_has_to_be_there(self, name):
        content = json.loads(to_json(report_of(cell(0, 1.0, 2.0))))
        del content[name]
        with pytest.raises(BenchError, match=f"x: {name}: expected a value, found nothing"):
            from_json(json.dumps(content), "x")

    def test_rows_that_come_twice_are_refused(self):
        report = report_of(cell(0, 1.0), cell(0, 2.0))
        with pytest.raises(BenchError, match="cells: expected at least one, and each once"):
            from_json(to_json(report), "x")

    @pytest.mark.parametrize("name", ["prompt_length", "batch_size"])
    def test_rows_of_nothing_are_refused(self, name):
        report = report_of(replace(cell(0, 1.0), **{name: 0}))
        with pytest.raises(
            BenchError, match=r"^x: cells: expected prompts of a token or more in a row or more, found 0"
        ):
            from_json(to_json(report), "x")

    def test_the_figures_are_those_of_a_sample(self):
        assert {name for name in bench_file.FIGURES if math.isfinite(getattr(sample(1.0), name))} == {
            *Sample.__dataclass_fields__,
            "prefill",
        }


def test_a_random_prefix_fits_a_cache_of_eight_bits(workshop):
    bundle = Bundle.open(workshop.bundle(cache="int8"))
    prefix = random_prefix(bundle, 5)
    bundle.check_prefix(prefix, "random")
    assert prefix == random_prefix(bundle, 5)
    for layer in prefix.sites["decoder"]:
        assert layer.key.shape == (4, 5, 16)
        assert layer.key.std() > 0
