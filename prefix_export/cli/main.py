"""The command line `prefix-export`: flags and printed text, nothing else. Commands import torch when they need it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefix_export import __version__
from prefix_export.errors import PrefixExportError
from prefix_runtime.cli import main as runtime
from prefix_runtime.cli.base import HUB_ID_OR_PATH, PATH, ErrorReportingGroup
from prefix_runtime.cli.generate import generate

from .bench import bench
from .console import libraries_quiet, showing_progress
from .prefix import compose, fold, inspect
from .summary import print_parity, print_summary
from .tensorrt import refit, tensorrt

if TYPE_CHECKING:
    from prefix_runtime import Bundle, Prefix


class _Group(ErrorReportingGroup):
    expected_errors = (PrefixExportError, *ErrorReportingGroup.expected_errors)


@click.group(cls=_Group)
@click.version_option(__version__)
def main() -> None:
    """Export trained prefixes and their frozen model into a bundle that runs without torch."""


@main.command()
@click.option(
    "--model",
    type=HUB_ID_OR_PATH,
    required=True,
    help="The frozen base model: a Hub id, ID@REVISION, a folder or a GGUF file.",
)
@click.option("--revision", help="Branch, tag or commit of the Hub id in --model; the same as ID@REVISION.")
@click.option(
    "--prefix",
    "prefixes",
    metavar="[TASK=]PATH",
    multiple=True,
    help="A trained prefix: a file, a folder or a Hub id, ID@REVISION too. Repeatable; TASK defaults to its name.",
)
@click.option("--output", type=PATH, default="bundle", show_default=True, help="Folder for the bundle; must not exist.")
@click.option(
    "--max-length", type=int, help="Maximum number of positions for prefix plus text. Default: the model's context."
)
@click.option(
    "--mode",
    default="feed",
    show_default=True,
    help="feed: prefixes are inputs, so you can add and remove tasks. bake: the graph holds them, for other clients.",
)
@click.option(
    "--target",
    help="Program that runs the graph: cpu, cuda, portable, web or tensorrt. Default: cpu; with --mode bake portable.",
)
@click.option("--opset", type=int, help="Opset of ONNX's own operators, 18 to 23. Default: 21.")
@click.option(
    "--graph",
    type=PATH,
    help="Use this ONNX decoder-with-past of the model unchanged, such as an export by optimum.",
)
@click.option(
    "--adapters", metavar="onnx", help="Also write onnxruntime's adapter file for each task; for portable and web."
)
@click.option(
    "--precision",
    help="Precision of the weights: fp32, fp16, bf16, int8 or int4. Default: fp32; for cuda fp16, for web int8.",
)
@click.option("--block-size", type=int, help="Number of weights that share a scale; not for tensorrt. Default: 32.")
@click.option("--quantizer", default="rtn", show_default=True, help="rtn rounds to nearest; hqq searches zero points.")
@click.option(
    "--cache", help="Type of cached keys and values: fp32, fp16, bf16 or int8. Default: fp32, or as the weights."
)
@click.option(
    "--held-out",
    metavar="[TASK=]TEXT_FILE",
    multiple=True,
    help="A text file, one example per line, used to compare the quantized model with float32. Text before a tab is a "
    "prompt and does not count. With --cache int8, every other text measures the scales. Repeatable. Default: the "
    "demo's texts.",
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with the source framework.")
def build(
    model: str, revision: str | None, prefixes: tuple[str, ...], held_out: tuple[str, ...], **options: Any
) -> None:
    """Export a model and trained prefixes into a bundle."""
    from prefix_export.build.request import BuildRequest, check_request, check_sources
    from prefix_export.models.hub import with_revision

    model = with_revision(model, revision) or model

    request = BuildRequest(model, _by_task(prefixes), held_out=_held_out(held_out), **options)
    check_request(request)
    check_sources(request)
    with showing_progress() as progress:
        progress.phase("import libraries")
        with libraries_quiet():
            from prefix_export.build.recipe import build

            result = build(request, progress)
    print_summary(result)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)


@main.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--model",
    type=HUB_ID_OR_PATH,
    help="Also compare the graph with this model, for every task: a Hub id, a folder or a GGUF file.",
)
@click.option("--revision", help="Branch, tag or commit of the Hub id in --model.")
def verify(bundle: Path, model: str | None, revision: str | None) -> None:
    """Compare every file of BUNDLE with its SHA-256, and with --model the graph with the model."""
    from prefix_export.models.hub import with_revision
    from prefix_export.models.names import check_model
    from prefix_runtime import Bundle

    model = with_revision(model, revision)

    opened = Bundle.open(bundle)
    if model is not None:
        check_model(model)
    click.echo(runtime.verified(opened))
    if model is None:
        return
    with showing_progress() as progress:
        progress.phase("import libraries")
        with libraries_quiet():
            from prefix_export.build.recipe import verify_against

            parity = verify_against(opened, model, progress)
    print_parity(opened, parity)


@main.group()
def tasks() -> None:
    """List, add or remove the tasks of a bundle."""


@tasks.command("add")
@click.argument("bundle", type=PATH)
@click.argument("prefix", metavar="[TASK=]PATH")
def add_task(bundle: Path, prefix: str) -> None:
    """Fold the adapter or prefix file at PATH and add it to BUNDLE, as TASK or under its own name.

    The command checks that the prefix fits the bundle's model. `verify --model` compares it with the model itself.
    """
    from prefix_export.models.names import check_checkpoint

    def read(path: Path, opened: Bundle) -> Prefix:
        check_checkpoint(path)
        from prefix_export.prefixes.fold import fold_for_bundle  # after the checks, as it imports torch

        prefix, warnings = fold_for_bundle(path, opened)
        for warning in warnings:
            click.echo(f"warning: {path}: {warning}", err=True)
        return prefix

    runtime.add_to_bundle(bundle, prefix, read)


tasks.add_command(runtime.list_tasks)
tasks.add_command(runtime.remove_task)
main.add_command(generate)
main.add_command(runtime.prepare)
main.add_command(bench)
for command in (inspect, fold, compose, tensorrt, refit):
    main.add_command(command)


def _by_task(prefixes: tuple[str, ...]) -> dict[str, Path]:
    pairs = [runtime.split_task(prefix) for prefix in prefixes]
    twice = {name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1}
    if twice:
        raise click.UsageError(f"--prefix: two prefixes for the task {min(twice)!r}; name them with TASK=PATH")
    return dict(pairs)


def _held_out(files: tuple[str, ...]) -> dict[str | None, Path]:
    pairs = [runtime.split_named(file) for file in files]
    paths = dict(pairs)
    if len(paths) < len(pairs):
        raise click.UsageError("--held-out: two files for one task, or for all tasks; name one")
    return paths
