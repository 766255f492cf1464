"""`prefix-export tensorrt` and `tensorrt-refit`: build TensorRT engines from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefix_runtime.cli import main as runtime
from prefix_runtime.cli.base import PATH, print_fields

from .console import showing_progress

if TYPE_CHECKING:
    from prefix_export.tensorrt.tensorrt_engine import TensorRTEngineResult
    from prefix_runtime.backends.tensorrt.tensorrt_engine_file import TensorRTEngineRecord

_BACKEND = click.option(
    "--backend",
    default="tensorrt-rtx",
    show_default=True,
    help="tensorrt-rtx needs no GPU; tensorrt builds for this machine's GPU.",
)


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--output", type=PATH, help="Folder for engines. Default: tensorrt, inside BUNDLE.")
@_BACKEND
@click.option(
    "--compute-capability",
    "compute_capabilities",
    metavar="X.Y",
    multiple=True,
    help="Compute capability of the GPUs: 7.5, 8.0, 8.6, 8.9, 12.0, 12.1. Repeatable. Default: 8.0 and above.",
)
@click.option("--max-batch", type=int, help="Maximum number of rows that decode together. Default: 8.")
@click.option("--max-prompt", type=int, help="Maximum number of tokens in a prompt. Default: the model's room.")
@click.option("--max-prefix", type=int, help="Maximum length of a fed prefix. Default: the longest task's.")
@click.option("--precision", help="With TensorRT before 11: also compute in fp16 or bf16. Default: the graph's types.")
@click.option("--refit", "is_refittable", is_flag=True, help="Allow baked prefixes to be replaced; needs a GPU.")
@click.option(
    "--version-compatible",
    "is_version_compatible",
    is_flag=True,
    help="Set the flags that let later versions run the engine; not tested.",
)
@click.option("--timing-cache", type=PATH, help="With --backend tensorrt: file of its measurements, read and written.")
def tensorrt(bundle: Path, compute_capabilities: tuple[str, ...], **options: Any) -> None:
    """Build a TensorRT engine from BUNDLE's graph, with a profile for prompts and one for decode steps."""
    from prefix_export.tensorrt.request import TensorRTEngineRequest, check_request

    request = TensorRTEngineRequest(bundle, compute_capabilities=compute_capabilities or None, **options)
    check_request(request)
    with showing_progress() as progress:
        from prefix_export.tensorrt.tensorrt_engine import build_tensorrt_engine  # after the checks, as it imports onnx

        result = build_tensorrt_engine(request, progress)
    _print(result)


@click.command("tensorrt-refit")
@click.argument("bundle", type=PATH)
@click.argument("prefix", metavar="TASK=PATH")
@click.option("--output", type=PATH, required=True, help="Folder for the engine; must not exist.")
@click.option("--engines", type=PATH, help="Folder of engines. Default: tensorrt, inside BUNDLE.")
@click.option("--engine", "name", help="Name of the engine, if there are several.")
def refit(bundle: Path, prefix: str, output: Path, engines: Path | None, name: str | None) -> None:
    """Copy an engine of BUNDLE that was built with --refit, and replace TASK's prefix by the one at PATH.

    The new prefix must have the same length, and the command needs a GPU that runs the engine. To use the copy, put it
    into BUNDLE/tensorrt instead of the original. BUNDLE's certificate still describes the old prefix.
    """
    from prefix_export.models.names import check_checkpoint
    from prefix_runtime import Bundle
    from prefix_runtime.backends.tensorrt.library import Library
    from prefix_runtime.backends.tensorrt.tensorrt_engine_file import tensorrt_engines_folder
    from prefix_runtime.bundle.staging import check_output
    from prefix_runtime.bundle.task_names import unknown_task

    task, path = runtime.split_task(prefix)
    check_output(output)
    check_checkpoint(path)
    opened = Bundle.open(bundle)
    if task not in opened.manifest.tasks:
        raise unknown_task(task, opened.tasks)
    folder = engines or tensorrt_engines_folder(opened)

    from prefix_export.prefixes.fold import fold_for_bundle  # after the checks, as these import torch and onnx
    from prefix_export.tensorrt.refit import refit_tensorrt_engine
    from prefix_export.tensorrt.tensorrt_engine import find_tensorrt_engine

    record = find_tensorrt_engine(folder, opened, name)
    folded, warnings = fold_for_bundle(path, opened)
    for warning in warnings:
        click.echo(f"warning: {path}: {warning}", err=True)
    library, file = Library(record.backend), folder / record.file.path
    refitted = refit_tensorrt_engine(opened, file, record, task=task, prefix=folded, output=output, library=library)
    click.echo(f"{output / refitted.file.path}: {task} replaced")


def _print(result: TensorRTEngineResult) -> None:
    from prefix_runtime.bundle.graph_contract import ATTENTION_MASK, INPUT_IDS

    record = result.record
    path = result.folder / record.file.path
    if not result.seconds:
        click.echo(f"{path}: is up to date")
        return
    prefill, decode = record.profiles
    rows, positions = decode.inputs[ATTENTION_MASK][2]
    print_fields(
        {
            "engine": f"{path}, {record.file.size / 1e6:.1f} MB in {result.seconds:.0f} s",
            "built by": f"{record.backend} {record.version}",
            "compute capability": ", ".join(record.compute_capabilities) or "as the library chooses",
            "prompts": f"of 1 to {prefill.inputs[INPUT_IDS][2][1]} tokens",
            "decode steps": f"of 1 to {rows} rows, {positions} positions",
            "read back": _read_back(record),
        },
        as_json=False,
    )


def _read_back(record: TensorRTEngineRecord) -> str:
    if record.read_back == "engine":
        return "inputs, outputs and profiles, from the engine"
    return "inputs, outputs and profiles, from the network: there is no GPU here to open the engine on"
