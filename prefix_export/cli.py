"""`prefix-export`, the command line: flags and printed text, nothing else. Torch is imported inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefix_runtime import cli as runtime
from prefix_runtime.errors import PrefixRuntimeError

from . import __version__
from .bench_cli import bench
from .errors import PrefixExportError
from .prefix_cli import compose, fold, inspect
from .tensorrt_cli import refit, tensorrt

if TYPE_CHECKING:
    from rich.table import Table

    from prefix_runtime import Bundle, Prefix

    from .build import BuildResult
    from .parity import TaskParity
    from .progress import StepListener


class _Group(runtime.ErrorReportingGroup):
    expected_errors = (PrefixExportError, PrefixRuntimeError, OSError)


@click.group(cls=_Group)
@click.version_option(__version__)
def main() -> None:
    """Trained prefixes and their frozen model, to a bundle that runs without torch."""


@main.command()
@click.option("--model", required=True, help="The frozen base model: a Hub id, ID@REVISION, a folder or a GGUF file.")
@click.option("--revision", help="Of a Hub id given as --model: a branch, tag or commit; the same as ID@REVISION.")
@click.option(
    "--prefix",
    "prefixes",
    metavar="[TASK=]PATH",
    multiple=True,
    help="A trained prefix: a file, a folder or a Hub id, ID@REVISION too. Repeatable; TASK defaults to its name.",
)
@click.option("--output", type=click.Path(path_type=Path), default="bundle", show_default=True, help="Must not exist.")
@click.option("--max-length", type=int, help="Positions that prefix and text may take. Default: the model's context.")
@click.option(
    "--mode",
    default="feed",
    show_default=True,
    help="feed: prefixes are the graph's first past, tasks come and go. bake: the graph holds them, for other clients.",
)
@click.option("--target", help="cpu, cuda, portable, web or tensorrt. Default: cpu; with --mode bake portable.")
@click.option("--opset", type=int, help="Of ONNX' own operators, 18 to 23. Default: 21.")
@click.option(
    "--graph",
    type=click.Path(path_type=Path),
    help="An ONNX decoder-with-past of the model, as optimum exports it, to use as it is.",
)
@click.option(
    "--adapters", metavar="onnx", help="Also write onnxruntime's adapter file for each task; portable graphs."
)
@click.option(
    "--precision",
    help="Of the weights: fp32, fp16, bf16, int8 or int4. Default: fp32; for cuda fp16, for the web int8.",
)
@click.option("--block-size", type=int, help="Weights that share a scale; not for tensorrt. Default: 32.")
@click.option("--quantizer", default="rtn", show_default=True, help="rtn rounds to nearest; hqq searches zero points.")
@click.option(
    "--cache", help="Keys and values are kept in: fp32, fp16, bf16 or int8. Default: fp32, or as the weights."
)
@click.option(
    "--held-out",
    metavar="[TASK=]TEXT_FILE",
    multiple=True,
    help="Texts, one a line, on which what is rounded is compared with float32; what stands before a tab is read and "
    "not counted. With --cache int8 every other text is what the scales are measured on. Repeatable. "
    "Default: the demo's.",
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with the source framework.")
def build(
    model: str, revision: str | None, prefixes: tuple[str, ...], held_out: tuple[str, ...], **options: Any
) -> None:
    """Export the model and fold the prefixes into a bundle."""
    from .hub import with_revision

    model = with_revision(model, revision) or model
    with runtime.cleaning_up_when_terminated(), libraries_quiet(), showing_progress() as on_step:
        from .build import BuildRequest, build

        result = build(BuildRequest(model, _by_task(prefixes), held_out=_held_out(held_out), **options), on_step)
    _print_summary(result)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)


@main.command()
@click.argument("bundle", type=runtime.BUNDLE)
@click.option("--model", help="Also compare the graph with this Hub id, folder or GGUF file, under every task.")
@click.option("--revision", help="Of a Hub id given as --model.")
def verify(bundle: Path, model: str | None, revision: str | None) -> None:
    """Compare every file of BUNDLE with its SHA-256, and the graph with the model if it is given."""
    from prefix_runtime import Bundle

    from .hub import with_revision

    model = with_revision(model, revision)
    opened = Bundle.open(bundle)
    click.echo(runtime.verified(opened))
    if model is not None:
        from .build import verify_against

        with libraries_quiet(), showing_progress() as on_step:
            parity = verify_against(opened, model, on_step)
        for task, result in parity.items():
            click.echo(
                f"{'the bare model' if task is None else task}: agrees with {result.reference} within "
                f"{result.largest_logit_difference:.1e}"
            )


@main.group()
def tasks() -> None:
    """List, add or remove the tasks of a bundle."""


@tasks.command("add")
@click.argument("bundle", type=runtime.BUNDLE)
@click.argument("prefix", metavar="[TASK=]PATH")
def add_task(bundle: Path, prefix: str) -> None:
    """Fold the adapter or prefix file at PATH and add it to BUNDLE, as TASK or under its own name.

    It is checked against the bundle's geometry; `verify --model` compares it with the model.
    """
    from .fold import fold_for_bundle

    def read(path: Path, opened: Bundle) -> Prefix:
        prefix, warnings = fold_for_bundle(path, opened)
        for warning in warnings:
            click.echo(f"warning: {path}: {warning}", err=True)
        return prefix

    runtime.add_to_bundle(bundle, prefix, read)


tasks.add_command(runtime.list_tasks)
tasks.add_command(runtime.remove_task)
main.add_command(runtime.generate)
main.add_command(runtime.prepare)
main.add_command(bench)
for command in (inspect, fold, compose, tensorrt, refit):
    main.add_command(command)


def _by_task(prefixes: tuple[str, ...]) -> dict[str, Path]:
    named = [runtime.split_task(prefix) for prefix in prefixes]
    twice = {name for name, _ in named if sum(name == other for other, _ in named) > 1}
    if twice:
        raise click.UsageError(f"--prefix: two prefixes for the task {min(twice)!r}; name them with TASK=PATH")
    return dict(named)


def _held_out(files: tuple[str, ...]) -> dict[str | None, Path]:
    named = [runtime.split_named(file) for file in files]
    found = dict(named)
    if len(found) < len(named):
        raise click.UsageError("--held-out: two files for one task, or for all; give one")
    return found


def _print_summary(result: BuildResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    manifest = result.bundle.manifest
    geometry = manifest.geometry
    layer = geometry.layers[0]
    megabytes = sum(entry.size for entry in result.bundle.entries()) / 1e6
    click.echo(
        f"{result.bundle.root}: {manifest.model.name} ({manifest.model.architecture}), {len(geometry.layers)} layers, "
        f"{layer.key_value_heads} key/value heads of {layer.head_dim}, context {geometry.context_length}; "
        f"{manifest.precision}, {megabytes:.1f} MB in {result.seconds:.0f} s"
    )
    table = Table("task", "length", "size", "agrees with", "logits within", "tokens", box=SIMPLE_HEAD)
    for task in (*([None] if manifest.mode == "feed" else []), *result.bundle.tasks):
        entry = manifest.tasks[task] if task else None
        parity = result.parity.get(task)
        table.add_row(
            task or "(no prefix)",
            str(entry.prefix_length) if entry else "0",
            _shown_size(entry.file.size) if entry else "",
            parity.reference if parity else "not compared",
            f"{parity.largest_logit_difference:.1e}" if parity else "",
            _shown_tokens(parity) if parity else "",
        )
    # In a pipe there is no width to keep to.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if result.quality:
        console.print(_quality_table(result))


def _quality_table(result: BuildResult) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    manifest = result.bundle.manifest
    title = f"{manifest.precision} weights, {manifest.cache} keys and values, against float32"
    table = Table("task", "held-out text", "tokens", "greedy agreement", "perplexity", box=SIMPLE_HEAD, title=title)
    for task, quality in result.quality.items():
        before, after, change = quality.reference_perplexity, quality.perplexity, quality.perplexity_change
        table.add_row(
            task or "(no prefix)",
            quality.held_out,
            str(quality.positions),
            f"{quality.greedy_agreement:.1%}",
            f"{before:.4g} → {after:.4g} ({change:+.1%})" if change is not None else "",
        )
    return table


def _shown_tokens(parity: TaskParity) -> str:
    return f"equal, {parity.ties} ties" if parity.ties else "equal"


def _shown_size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


@contextmanager
def showing_progress() -> Iterator[StepListener]:
    """A spinner with the step and its time on a terminal; silence in a pipe."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        current = progress.add_task("")
        yield lambda step: progress.reset(current, description=step)


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Keep progress bars and advice of the libraries, which are not the user's to follow, from the terminal."""
    import logging as standard_logging
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    standard_logging.getLogger("huggingface_hub").setLevel(standard_logging.ERROR)
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
