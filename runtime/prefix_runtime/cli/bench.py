"""The command `bench`: its options, progress and output. The exporter's command adds options to these."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from prefix_runtime.errors import BenchError

from .base import PATH, STANDARD_OUTPUT, is_dumb_terminal, line_width, table_width, write_output

if TYPE_CHECKING:
    from prefix_runtime.bench.measurements import BenchReport, Comparison
    from prefix_runtime.bench.request import BenchRequest
    from prefix_runtime.bench.run import StepListener

_OUTPUTS = ("json", "csv", "html", "png")
_FROM_COMMAND_LINE = click.core.ParameterSource.COMMANDLINE
F = TypeVar("F", bound=Callable[..., Any])


def _numbers(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
    """The whole numbers of a repeatable option with comma-separated values."""
    try:
        return tuple(int(part) for value in values for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected whole numbers with commas between, found {', '.join(values)!r}") from error


_OPTIONS = (
    click.option(
        "--prefix-length",
        "prefix_lengths",
        callback=_numbers,
        multiple=True,
        metavar="N,N,...",
        help="Lengths of random prefixes, 0 for none; not if baked. Repeatable. Default: 0,1,5,10,20,50,100,200.",
    ),
    click.option(
        "--task", "tasks", multiple=True, help="Also measure this task of the bundle. Repeatable. Default: the first 8."
    ),
    click.option(
        "--prompt-length",
        "prompt_lengths",
        callback=_numbers,
        multiple=True,
        metavar="N,N,...",
        help="Lengths of random prompts in tokens. Repeatable. Default: 32.",
    ),
    click.option(
        "--batch-size",
        "batch_sizes",
        callback=_numbers,
        multiple=True,
        metavar="N,N,...",
        help="Rows that decode together. Repeatable. Default: 1.",
    ),
    click.option("--new-tokens", type=int, help="New tokens of each generation, 2 or more. Default: 32."),
    click.option("--rounds", type=int, help="Rounds; every row runs once in each, in shuffled order. Default: 7."),
    click.option("--threads", type=int, help="CPU threads for one run. Default: onnxruntime decides."),
    click.option("--provider", help="Execution provider: cpu, cuda or tensorrt-engine. Default: cpu."),
    click.option(
        "--against", type=PATH, help="Compare with this bundle, in the same rounds, or with this JSON report."
    ),
    click.option(
        "--json",
        type=PATH,
        help="Write the report to this file as JSON, for --against and for programs; - is standard output.",
    ),
    click.option("--csv", type=PATH, help="Write the rows to this file as CSV; - is standard output."),
    click.option(
        "--html", type=PATH, help="Write the report to this file as an HTML page with charts; - is standard output."
    ),
    click.option(
        "--png", type=PATH, help="Write the charts to this file; needs matplotlib, in prefix-runtime[report]."
    ),
)


def bench_options(function: F) -> F:
    """Add the options of every `bench` command, for `run`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command()
@click.argument("bundle", type=PATH)
@bench_options
def bench(bundle: Path, **flags: Any) -> None:
    """Measure BUNDLE at several prefix lengths, and its tasks, in interleaved rounds.

    Prints time to first token, inter-token latency, tokens per second beside the limit of memory bandwidth, the
    overhead against no prefix, and the cost of selecting a task and of opening the bundle.
    """
    check_flags(flags)
    check_bundle(bundle, flags)
    with progress() as on_step:
        run(bundle, flags, on_step)


def run(bundle: Path, flags: dict[str, Any], on_step: StepListener) -> None:
    """Measure a bundle with the flags of `bench_options`, print the tables and write the files."""
    from prefix_runtime.bench.report.tables import as_text

    report, comparison = _measure(bundle, flags, on_step)
    on_step(0, 0, "")
    if STANDARD_OUTPUT not in (flags[name] for name in _OUTPUTS):
        # Print before writing files, so that the result is not lost if a file cannot be written.
        click.echo(as_text(report, comparison, line_width=line_width(), table_width=table_width()), nl=False)
    for name in _OUTPUTS:
        if flags[name]:
            write_output(flags[name], _content(name, report, comparison))


def check_bundle(bundle: Path, flags: dict[str, Any]) -> None:
    """Check that there is a bundle, and that at least one row fits it.

    Raises:
        BundleError, BundleIntegrityError: there is no bundle, or its files are missing.
        BenchError: no row fits the bundle.
        UnknownTaskError: the bundle does not have a named task.
    """
    from prefix_runtime.bench.plan import plan_rows
    from prefix_runtime.bundle.folder import Bundle

    against = flags["against"]
    for path in (bundle, *([against] if against is not None and against.is_dir() else [])):
        plan_rows(Bundle.open(path), _request(flags))


def check_flags(flags: dict[str, Any]) -> None:
    """Check the options before anything is built or measured.

    Raises:
        BenchError: a number is out of range, a file is not a report, an output cannot be written, two outputs name one
            file, or matplotlib is not installed.
        ProviderError: the provider is unknown or not installed, or cannot use that number of threads.
    """
    from prefix_runtime.backends.options import check_threads
    from prefix_runtime.backends.registry import check_known

    request = _request(flags)
    check_known(request.provider)
    if request.threads is not None:
        check_threads(request.threads)
    if flags["against"] is not None and not flags["against"].is_dir():
        _read_report(flags["against"])
    written: dict[Path, str] = {}
    for name in _OUTPUTS:
        path: Path | None = flags[name]
        if path is None:
            continue
        if (other := written.setdefault(path.resolve(), name)) != name:
            raise BenchError(f"--{name} {path}: expected a file of its own, found that of --{other}")
        if path == STANDARD_OUTPUT:
            continue
        if obstacle := _obstacle(path.resolve()):
            raise BenchError(f"--{name} {path}: expected a file in a folder that exists, or -, found {obstacle}")
    if flags["png"]:
        _check_png(flags["png"])
    if request.provider != "cpu":  # every onnxruntime has cpu: no need to import it
        from prefix_runtime.backends.onnxruntime.providers import check_provider

        check_provider(request.provider)


def _check_png(path: Path) -> None:
    from prefix_runtime.bench.report.png import check_library

    if path == STANDARD_OUTPUT and sys.stdout.isatty():
        raise BenchError("--png -: expected a pipe or a file for the image, found a terminal")
    check_library()


def _obstacle(path: Path) -> str | None:
    """The reason why a file cannot be written; None if it can."""
    if path.is_dir():
        return "a folder of that name"
    if not path.parent.is_dir():
        return f"no folder {path.parent}"
    if path.exists() and not path.is_file():
        return "something of that name that is not a file"
    return None if os.access(path.parent, os.W_OK) else f"that {path.parent} is not writable"


@contextmanager
def progress() -> Iterator[StepListener]:
    """Show the current step and the remaining time in one line on a terminal, and nothing in a pipe."""
    if not sys.stderr.isatty() or is_dumb_terminal():
        yield lambda done, total, text: None
        return
    line = _ProgressLine()
    try:
        yield line.show
    finally:
        line.show(0, 0, "")


class _ProgressLine:
    """One line on standard error that is overwritten each time; an empty text clears it."""

    def __init__(self) -> None:
        self._started: float | None = None

    def show(self, done: int, total: int, text: str) -> None:
        if total and self._started is None:
            self._started = time.perf_counter()
        shown = f"[{done:>{len(str(total))}}/{total}] {text}{self._left(done, total)}" if total else text
        width = shutil.get_terminal_size().columns - 1
        click.echo(f"\r\x1b[2K{shown[:width]}", err=True, nl=False)

    def _left(self, done: int, total: int) -> str:
        # Opening and rows take different times: an estimate needs some finished rows.
        if self._started is None or done * 10 < total:
            return ""
        seconds = (time.perf_counter() - self._started) / done * (total - done)
        return f", about {seconds:.0f} s left" if seconds < 90 else f", about {seconds / 60:.0f} min left"


def _measure(bundle: Path, flags: dict[str, Any], on_step: StepListener) -> tuple[BenchReport, Comparison | None]:
    from prefix_runtime.bench.measurements import Comparison
    from prefix_runtime.bench.run import bench, bench_together

    request, against, command = _request(flags), flags["against"], _shown_command(click.get_current_context())
    if against is not None and against.is_dir():
        report, other = bench_together([bundle, against], request, on_step)
        report = replace(report, command=command)
        return report, Comparison(report, replace(other, command=command), interleaved=True)
    other_report = None if against is None else _read_report(against)
    report = replace(bench(bundle, request, on_step), command=command)
    return report, Comparison(report, other_report, interleaved=False) if other_report else None


def _read_report(path: Path) -> BenchReport:
    from prefix_runtime.bench.file import MOST_BYTES, from_json

    if not path.is_file():
        raise BenchError(
            f"--against {path}: expected a bundle folder or a report that `bench --json` wrote, found none"
        )
    if path.stat().st_size > MOST_BYTES:
        raise BenchError(f"--against {path}: expected a report of at most {MOST_BYTES} bytes")
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise BenchError(f"--against {path}: expected a report that `bench --json` wrote, found {error}") from error


def _request(flags: dict[str, Any]) -> BenchRequest:
    """The request with the options that the user named; the others keep the request's defaults."""
    from prefix_runtime.bench.request import BenchRequest

    names = ("prefix_lengths", "prompt_lengths", "batch_sizes", "tasks")
    lists = {name: flags[name] for name in names if flags[name]}
    plain = {name: flags[name] for name in ("new_tokens", "rounds", "threads", "provider") if flags[name] is not None}
    return BenchRequest(**lists, **plain)


def _content(name: str, report: BenchReport, comparison: Comparison | None) -> bytes:
    from prefix_runtime.bench import file as bench_file
    from prefix_runtime.bench.report.html import as_html
    from prefix_runtime.bench.report.png import as_png

    against = comparison.against if comparison else None
    match name:
        case "json":
            return bench_file.to_json(report, against).encode()
        case "csv":
            return bench_file.to_csv([report, against] if against else [report]).encode()
        case "html":
            return as_html(report, comparison).encode()
        case _:
            return as_png(report, comparison)


def _shown_command(context: click.Context) -> str:
    """The command line, without the folders of files, because they may contain personal names."""
    parts = [context.command_path]
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not _FROM_COMMAND_LINE:
            continue
        flag = [parameter.opts[0]] if isinstance(parameter, click.Option) else []
        for value in _shown_values(context.params[name]):
            parts += [*flag, value] if value else flag
    return " ".join(parts)


def _shown_values(value: Any) -> list[str]:
    """One text for each repetition of the option; an empty one for a flag."""
    if isinstance(value, tuple):
        return [",".join(map(str, value))] if value and isinstance(value[0], int) else list(value)
    if value is True:
        return [""]
    path = Path(str(value))
    return [path.name if isinstance(value, Path) or path.is_absolute() else str(value)]
