"""The command line `prefix-runtime`: flags and printed text, nothing else.

The commands are plain `click` objects; `prefix_export.cli.main` also offers those that need only the runtime.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefix_runtime import __version__

from .base import PATH as BUNDLE
from .base import ErrorReportingGroup, expanded, print_fields
from .bench import bench
from .generate import generate

if TYPE_CHECKING:
    from prefix_runtime.bundle.folder import Bundle
    from prefix_runtime.bundle.manifest import Manifest
    from prefix_runtime.prefix.prefix import Prefix


@click.group(cls=ErrorReportingGroup)
@click.version_option(__version__)
def main() -> None:
    """Run a frozen model with trained prefixes, one per task."""


@main.command()
@click.argument("path", type=BUNDLE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Describe the bundle or prefix file at PATH."""
    from prefix_runtime.bundle.folder import Bundle
    from prefix_runtime.prefix.prefix import Prefix

    if path.is_file():
        print_fields(Prefix.load(path).describe(), as_json)
    else:
        print_bundle(Bundle.open(path), as_json)


@main.command()
@click.argument("bundle", type=BUNDLE)
def verify(bundle: Path) -> None:
    """Compare every file of BUNDLE with its SHA-256, and read every prefix."""
    from prefix_runtime.bundle.folder import Bundle

    click.echo(verified(Bundle.open(bundle)))


@main.command()
@click.argument("bundle", type=BUNDLE)
@click.option("--remove", is_flag=True, help="Remove the packed copy instead.")
def prepare(bundle: Path, remove: bool) -> None:
    """Save a copy of BUNDLE's graph, packed for this processor, so that BUNDLE opens faster from now on.

    The copy is saved in your cache folder, or in PREFIX_RUNTIME_CACHE, and takes about twice the bundle's size. The
    first opening of a bundle of 1 GB or more saves it automatically, unless its weights have 4 bits. An existing copy
    is compared with its SHA-256.
    """
    from prefix_runtime.bundle.folder import Bundle

    opened = Bundle.open(bundle)
    from prefix_runtime.backends.onnxruntime import (
        automatic_packing as packing,  # imports onnxruntime: only after the bundle was opened
    )

    if remove:
        is_removed = packing.discard_packed(opened)
        click.echo(f"removed the packed copy of {bundle}" if is_removed else "there is no packed copy")
        return
    graph = packing.pack_for_good(opened, compares=True)
    size = sum(path.stat().st_size for path in graph.parent.iterdir())
    click.echo(f"{graph.parent}: {size / 1e6:.1f} MB")


@main.group()
def tasks() -> None:
    """List, add or remove the tasks of a bundle."""


@tasks.command("list")
@click.argument("bundle", type=BUNDLE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_tasks(bundle: Path, as_json: bool) -> None:
    """List the tasks of BUNDLE with their prefix lengths."""
    from prefix_runtime.bundle.folder import Bundle

    entries = Bundle.open(bundle).manifest.tasks
    if as_json:
        click.echo(json.dumps({name: asdict(entries[name]) for name in sorted(entries)}))
        return
    for name in sorted(entries):
        click.echo(f"{name}\tprefix length {entries[name].prefix_length}\t{entries[name].file.size} bytes")


@tasks.command("add")
@click.argument("bundle", type=BUNDLE)
@click.argument("prefix", metavar="[TASK=]PATH")
def add_task(bundle: Path, prefix: str) -> None:
    """Add the prefix file at PATH to BUNDLE, as TASK or under the file's name."""
    from prefix_runtime.prefix.prefix import Prefix

    add_to_bundle(bundle, prefix, lambda path, _: Prefix.load(path))


@tasks.command("remove")
@click.argument("bundle", type=BUNDLE)
@click.argument("task")
def remove_task(bundle: Path, task: str) -> None:
    """Remove TASK from BUNDLE."""
    from prefix_runtime.bundle.folder import Bundle

    Bundle.open(bundle).remove_task(task)
    click.echo(f"removed {task} from {bundle}")


main.add_command(bench)
main.add_command(generate)


def add_to_bundle(bundle: Path, prefix: str, read: Callable[[Path, Bundle], Prefix]) -> None:
    """Add the prefix that `read` returns for `[TASK=]PATH` to a bundle, after a check of the name, and print it."""
    from prefix_runtime.bundle.folder import Bundle
    from prefix_runtime.bundle.task_names import check_new_task_name

    name, path = split_task(prefix)
    opened = Bundle.open(bundle)
    opened.check_folder_may_change()
    check_new_task_name(name, opened.manifest.tasks)
    opened.add_task(name, read(path, opened))
    click.echo(f"added {name} to {bundle}")


def split_task(text: str) -> tuple[str, Path]:
    """The task and the path in `[TASK=]PATH`; without a task, the name of the file or folder."""
    name, path = split_named(text)
    if name is not None:
        return name, path
    # The revision of a Hub id is not part of the name.
    plain = path if path.exists() else Path(str(path).partition("@")[0])
    # PEFT's file has the same name in every folder: use the folder's name.
    source = plain.absolute().parent if plain.stem == "adapter_model" else plain.absolute()
    return (source.name if plain.is_dir() or source != plain.absolute() else source.stem), path


def split_named(text: str) -> tuple[str | None, Path]:
    """The task, or None, and the path in `[TASK=]PATH`; an existing path with a `=` in it is a path."""
    name, separator, rest = text.partition("=")
    if not separator or os.path.exists(text):  # noqa: PTH110  # Path's raises if the name is too long
        return None, Path(expanded(text))
    if not rest:
        raise click.UsageError(f"expected [TASK=]PATH, found {text!r} without a path")
    return name, Path(expanded(rest))


def verified(bundle: Bundle) -> str:
    """Verify a bundle's hashes and prefixes, and return a line with the result."""
    bundle.verify()
    for name in bundle.tasks:
        bundle.prefix(name)
    return f"{bundle.root}: {len(bundle.entries())} files and {len(bundle.tasks)} prefixes match the manifest"


def print_bundle(bundle: Bundle, as_json: bool) -> None:
    """Print a description of a bundle."""
    from prefix_runtime.bundle.certificate import agreement_of
    from prefix_runtime.generation.generation_config import shown_defaults

    manifest = bundle.manifest
    if as_json:
        click.echo(manifest.to_json(), nl=False)
        return
    first = manifest.geometry.layers[0]
    size = sum(entry.size for entry in manifest.files.values())
    print_fields(
        {
            "format": f"bundle, by {manifest.producer}",
            "model": f"{manifest.model.name} ({manifest.model.architecture})",
            **({"revision": manifest.model.revision} if manifest.model.revision else {}),
            "fingerprint": manifest.model.fingerprint,
            "layers": str(len(manifest.geometry.layers)),
            "key/value heads": str(first.key_value_heads),
            "head size": str(first.head_dim),
            "context": f"{manifest.geometry.context_length} positions, {manifest.max_length} used",
            "graph": f"{manifest.mode}, {manifest.flavour} flavour, for {manifest.target}",
            "weights": f"{manifest.precision}{_rounding_note(manifest)}",
            "keys and values": manifest.cache,
            **shown_defaults(bundle),
            "size": f"{size / 1e6:.1f} MB without prefixes",
            "tasks": ", ".join(
                f"{name} (prefix length {manifest.tasks[name].prefix_length}, {agreement_of(manifest, name)})"
                for name in bundle.tasks
            )
            or "none",
        },
        as_json,
    )


def _rounding_note(manifest: Manifest) -> str:
    if not manifest.quantizer:
        return ""
    shared = f"in blocks of {manifest.block_size}" if manifest.block_size else "with a scale for each output"
    return f", by {manifest.quantizer} {shared}"
