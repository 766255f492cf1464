"""Measure bundles: rows run in interleaved rounds, so that noise on the machine does not favour one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from prefix_runtime import machine
from prefix_runtime.backends.onnxruntime.packed_graphs import packed_graph
from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.engine import Engine, load
from prefix_runtime.generation.arguments import GenerationOptions
from prefix_runtime.generation.generation_config import PLAIN

from .bandwidth import BandwidthProbe, CopyProbe, Probe
from .fresh_process import run_in_fresh_process
from .inputs import free_name, random_prefix, random_prompts
from .measurements import BenchReport, Cell, Opening, Sample, Subject, Switch
from .plan import BenchPlan, BenchRow, plan_rows
from .request import BenchRequest

if TYPE_CHECKING:
    from prefix_runtime.backends.gpu.device import Device

StepListener = Callable[[int, int, str], None]
"""A function that is called before each step: finished steps, all steps, and the step in words."""

LEAST_OPENINGS = 3
"""Minimum number of openings of a bundle; each row is one."""

T = TypeVar("T")


@dataclass
class _Step(Generic[T]):
    """A measurement that runs once per round."""

    text: str
    measure: Callable[[], T]
    samples: list[T] = field(default_factory=list)


def bench(
    path: str | Path, request: BenchRequest | None = None, on_step: StepListener = lambda done, total, text: None
) -> BenchReport:
    """Measure a bundle.

    Args:
        path: the bundle's folder.
        request: what to measure; None takes the defaults of `BenchRequest`.
        on_step: is called before each step, see `StepListener`.

    Returns:
        All samples, and figures computed from them.

    Raises:
        BenchError: no requested row fits the bundle, or a process that opens it failed; the message gives the reason.
        UnknownTaskError: the request names a task that the bundle does not have.
        BundleError, BundleIntegrityError, ProviderError: see `load`.

    >>> bench("bundle", BenchRequest(prefix_lengths=(0, 100), rounds=3)).bytes_per_second  # doctest: +SKIP
    """
    return bench_together([path], request, on_step)[0]


def bench_together(
    paths: Sequence[str | Path],
    request: BenchRequest | None = None,
    on_step: StepListener = lambda done, total, text: None,
) -> list[BenchReport]:
    """Measure several bundles in the same rounds; returns a report for each. See `bench` for arguments and errors."""
    request = request or BenchRequest()
    plans = [plan_rows(Bundle.open(path), request) for path in paths]
    progress = _Progress(on_step)
    progress.total = len(plans) * (_openings_of(plans) + 1) + (sum(map(_steps_of, plans)) + 1) * (request.rounds + 1)
    openings = _openings(plans, request, progress)
    contestants = [_Contestant(plan, request, progress) for plan in plans]
    bandwidth = _Step("read bandwidth", _probe(request, contestants[0]).measure)
    _run_rounds([bandwidth, *(step for each in contestants for step in each.steps)], request.rounds, progress)
    measured = tuple(bandwidth.samples)
    return [each.report(measured, opened) for each, opened in zip(contestants, openings, strict=True)]


def _probe(request: BenchRequest, contestant: _Contestant) -> Probe:
    device = contestant.device
    return BandwidthProbe(request.threads) if device is None else CopyProbe(device)


def _steps_of(plan: BenchPlan) -> int:
    return len(plan.rows) + len(plan.selections)


def _openings_of(plans: Sequence[BenchPlan]) -> int:
    return max(LEAST_OPENINGS, *(len(plan.rows) for plan in plans))


def _openings(plans: Sequence[BenchPlan], request: BenchRequest, progress: _Progress) -> list[tuple[Opening, ...]]:
    """The openings of each bundle, in turn: every row runs in a process of its own."""
    openings: list[list[Opening]] = [[] for _ in plans]
    # Before this process opens the bundles itself, so that the memory suffices.
    for number in range(_openings_of(plans)):
        for opened, plan in zip(openings, plans, strict=True):
            row = plan.rows[number % len(plan.rows)]
            progress.begin(f"{plan.bundle.root.name} in a fresh process, {row}")
            opened.append(run_in_fresh_process(plan.bundle.root, row, request))
    return [tuple(opened) for opened in openings]


def _run_rounds(steps: Sequence[_Step[Any]], rounds: int, progress: _Progress) -> None:
    """Measure every step once per round, in another order each time. The first round warms up and does not count."""
    random = np.random.default_rng(0)
    for number in range(rounds + 1):
        for index in random.permutation(len(steps)):
            step = steps[index]
            progress.begin(f"round {number} of {rounds}: {step.text}" if number else f"warming up: {step.text}")
            step.samples.append(step.measure())
    for step in steps:
        del step.samples[0]


class _Progress:
    def __init__(self, on_step: StepListener) -> None:
        self._on_step = on_step
        self._done = 0
        self.total = 0

    def begin(self, text: str) -> None:
        self._on_step(self._done, self.total, text)
        self._done += 1


class _Contestant:
    """One bundle's engine, its rows, and their samples."""

    def __init__(self, plan: BenchPlan, request: BenchRequest, progress: _Progress) -> None:
        progress.begin(f"opening {plan.bundle.root.name}")
        self._plan, self._request = plan, request
        self._engine = load(
            plan.bundle.root,
            provider=request.provider,
            threads=request.threads,
            max_batch=max(request.batch_sizes),
            prepare=False,
        )
        self._names: dict[BenchRow, str | None] = {BenchRow(None, 0): None}
        for row in plan.prefixes:
            self._names[row] = row.task or self._add_random(row.prefix_length)
        self._generations = {row: self._generation(row) for row in plan.rows}
        self._selections = {row: self._selection(row) for row in plan.selections}

    @property
    def device(self) -> Device | None:
        """The engine's GPU, or None."""
        return self._engine.device

    @property
    def steps(self) -> list[_Step[Any]]:
        """The measurements of each round."""
        return [*self._generations.values(), *self._selections.values()]

    def report(self, bandwidth: tuple[float, ...], openings: tuple[Opening, ...]) -> BenchReport:
        return BenchReport(
            command="",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=machine.versions(),
            machine=self._machine(),
            subject=Subject.of(self._plan.bundle),
            request=self._request,
            bandwidth=bandwidth,
            cells=tuple(
                Cell(row.task, row.prefix_length, row.prompt_length, row.batch_size, tuple(step.samples))
                for row, step in self._generations.items()
            ),
            switches=tuple(_switch(row, step.samples) for row, step in self._selections.items()),
            openings=openings,
            skipped=self._plan.skipped,
        )

    def _machine(self) -> dict[str, str]:
        description = machine.describe(None if self.device is None else self.device.name)
        is_packed = self._request.provider == "cpu" and packed_graph(self._plan.bundle) is not None
        return description | {"graph": "graph kept as it was packed"} if is_packed else description

    def _add_random(self, length: int) -> str:
        name = free_name(f"prefix-{length}", self._engine.tasks)
        self._engine.add_task(name, random_prefix(self._plan.bundle, length))
        return name

    def _generation(self, row: BenchRow) -> _Step[Sample]:
        prompts = random_prompts(self._plan.bundle, row)
        name = self._names[BenchRow(row.task, row.prefix_length)]
        measure = partial(_generate, self._engine, name, prompts, self._request.new_tokens)
        return _Step(str(row), measure)

    def _selection(self, row: BenchRow) -> _Step[tuple[float, float]]:
        return _Step(f"selecting {row.prefix}", partial(self._select, row))

    def _select(self, row: BenchRow) -> tuple[float, float]:
        """Seconds of the first and of the second selection of a prefix that is new to the engine."""
        started = time.perf_counter()
        if row.task:
            prefix = self._plan.bundle.prefix(row.task)
            read = time.perf_counter() - started
        else:
            prefix, read = random_prefix(self._plan.bundle, row.prefix_length), 0.0
        name = free_name("selected", self._engine.tasks)
        self._engine.add_task(name, prefix)
        try:
            first, second = (
                self._engine.generate(token_ids=[0], task=name, max_new_tokens=1).metrics.task_selection
                for _ in range(2)
            )
        finally:
            self._engine.remove_task(name)
        return read + first, second


def _generate(engine: Engine, task: str | None, prompts: list[list[int]], new_tokens: int) -> Sample:
    started = time.perf_counter()
    options: GenerationOptions = {"max_new_tokens": new_tokens, "ignore_end": True, "generation_config": PLAIN}
    results = engine.generate(token_ids=prompts, task=task, **options)
    seconds = time.perf_counter() - started
    metrics = [result.metrics for result in results]
    slowest = max(metrics, key=lambda each: each.time_to_first_token)
    return Sample(
        task_selection=slowest.task_selection,
        time_to_first_token=slowest.time_to_first_token,
        first_step=slowest.inter_token_latencies[0],
        inter_token_latency=float(np.median([each.inter_token_latencies for each in metrics])),
        tokens_per_second=sum(each.new_tokens for each in metrics) / seconds,
    )


def _switch(row: BenchRow, samples: Sequence[tuple[float, float]]) -> Switch:
    cold, warm = zip(*samples, strict=True)
    return Switch(row.task, row.prefix_length, cold, warm)
