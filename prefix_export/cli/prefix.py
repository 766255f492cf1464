"""`prefix-export inspect`, `fold` and `compose`: commands for prefixes outside a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefix_runtime.cli import main as runtime
from prefix_runtime.cli.base import HUB_ID_OR_PATH, PATH, UserPath, print_fields

from .console import libraries_quiet

if TYPE_CHECKING:
    from prefix_export.prefixes.fold import Folded
    from prefix_runtime import Prefix

_TEXT_FILE = UserPath(exists=True, dir_okay=False)
_REVISION = click.option("--revision", help="Branch, tag or commit of the Hub id in --model.")
_FORMAT = click.option(
    "--format",
    "format_name",
    help="Format of the checkpoint; overrules its content. See docs/reference/checkpoints.md.",
)


@click.command()
@click.argument("path", type=PATH)
@click.option("--model", type=HUB_ID_OR_PATH, help="The base model, as for fold: also show the folded prefix.")
@_REVISION
@_FORMAT
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, model: str | None, revision: str | None, format_name: str | None, as_json: bool) -> None:
    """Describe the bundle, prefix file or checkpoint at PATH."""
    from prefix_runtime.bundle.folder import MANIFEST_NAME, Bundle

    if (path / MANIFEST_NAME).exists():
        runtime.print_bundle(Bundle.open(path), as_json)
        return

    from prefix_export import formats
    from prefix_export.models.hub import with_revision
    from prefix_export.models.names import check_checkpoint, check_model

    model = with_revision(model, revision)
    formats.check_format(format_name)
    check_checkpoint(path)
    if model is not None:
        check_model(model)
    fields = dict(formats.describe(path if path.exists() else _fetched(path), format_name))
    if model is not None:
        with libraries_quiet():
            folded = _folded(path, model, format_name)
        for name, prefix in folded.prefixes.items():
            fields[f"folds to{f' {name}' if name else ''}"] = _shown(prefix)
        fields |= {f"warning {number}": line for number, line in enumerate(folded.warnings, 1)}
    print_fields(fields, as_json)


@click.command()
@click.argument("source", type=PATH, required=False)
@click.option("--text", help="Fold this text instead of SOURCE.")
@click.option("--text-file", type=_TEXT_FILE, help="Fold the text in this file instead of SOURCE.")
@click.option(
    "--model",
    type=HUB_ID_OR_PATH,
    required=True,
    help="The base model: a Hub id, ID@REVISION, a folder or a GGUF file.",
)
@_REVISION
@click.option(
    "--output",
    type=PATH,
    required=True,
    help="The prefix file, or a folder if SOURCE has several prefixes; must not exist.",
)
@click.option("--part", "parts", multiple=True, help="Fold only this one of several prefixes in SOURCE. Repeatable.")
@_FORMAT
def fold(source: Path | None, model: str, revision: str | None, output: Path, **options: Any) -> None:
    """Fold the checkpoint SOURCE, or a text, into keys and values for a model.

    Checkpoints with keys and values need only the model's configuration. Soft prompts and texts run through the model.
    """
    from prefix_export.models.hub import with_revision

    model = with_revision(model, revision) or model
    text, text_file = options["text"], options["text_file"]
    if sum(each is not None for each in (source, text, text_file)) != 1:
        raise click.UsageError("expected one of SOURCE, --text and --text-file")
    if source is None and options["format_name"]:
        raise click.UsageError("--format goes with SOURCE; a text has no format")
    if source is None and options["parts"]:
        raise click.UsageError("--part goes with SOURCE; a text is one prefix")
    _check_fold(source, model, output, options["format_name"])
    with libraries_quiet():
        from prefix_export.models import load_base_model
        from prefix_export.prefixes.fold import Folded, fold_text

        if source is not None:
            folded = _folded(source, model, options["format_name"])
        else:
            base = load_base_model(model)
            words = text if text is not None else _read_text(text_file)
            folded = Folded({"": fold_text(words, base)})
    _write(_chosen(folded.prefixes, options["parts"]), output)
    for warning in folded.warnings:
        click.echo(f"warning: {warning}", err=True)


@click.command()
@click.argument("prefixes", type=PATH, nargs=-1, required=True)
@click.option(
    "--average", "is_average", is_flag=True, help="Average prefixes of equal shape. Default: one after another."
)
@click.option(
    "--weight", "weights", type=float, multiple=True, help="Weight of each prefix in the average. Default: all equal."
)
@click.option("--output", type=PATH, required=True, help="The prefix file; must not exist.")
def compose(prefixes: tuple[Path, ...], is_average: bool, weights: tuple[float, ...], output: Path) -> None:
    """Combine several prefix files into one: one after another, or their average."""
    from prefix_export.prefixes.compose import average
    from prefix_runtime import Prefix
    from prefix_runtime.bundle.staging import check_output
    from prefix_runtime.prefix.composition import concatenated

    if weights and not is_average:
        raise click.UsageError("--weight: expected --average with it, found none")
    check_output(output)
    loaded = [Prefix.load(path) for path in prefixes]
    _write({"": average(loaded, weights or None) if is_average else concatenated(loaded)}, output)


def _check_fold(source: Path | None, model: str, output: Path, format_name: str | None) -> None:
    """Check the options before torch is imported."""
    from prefix_export import formats
    from prefix_export.models.names import check_checkpoint, check_model
    from prefix_runtime.bundle.staging import check_output

    check_output(output)
    formats.check_format(format_name)
    check_model(model)
    if source is not None:
        check_checkpoint(source)


def _fetched(path: Path) -> Path:
    """The folder with the downloaded files of a Hub id."""
    with libraries_quiet():
        from prefix_export.prefixes.fold import fetch_checkpoint

        return fetch_checkpoint(path)


def _folded(source: Path, model: str, format_name: str | None) -> Folded:
    from dataclasses import replace
    from functools import cache, partial

    from prefix_export.models import load_base_model, load_config
    from prefix_export.models.model_shape import ModelShape
    from prefix_export.prefixes.fold import fold as fold_checkpoint
    from prefix_export.prefixes.lint import lint

    shape = ModelShape.of_config(model, load_config(model))
    folded = fold_checkpoint(source, shape, cache(partial(load_base_model, model)), format_name)
    own = [
        f"{name}: {line}" if name else line for name, prefix in folded.prefixes.items() for line in lint(prefix, shape)
    ]
    return replace(folded, warnings=(*folded.warnings, *own))


def _read_text(path: Path | None) -> str:
    from prefix_export.errors import CheckpointError

    assert path is not None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: expected text in UTF-8, found {error}") from error


def _chosen(prefixes: Mapping[str, Prefix], parts: tuple[str, ...]) -> Mapping[str, Prefix]:
    from prefix_export.errors import CheckpointError

    unknown = sorted(set(parts) - set(prefixes))
    if unknown:
        known = ", ".join(sorted(filter(None, prefixes))) or "one prefix without a name"
        raise CheckpointError(f"part {unknown[0]!r}: expected one of {known}")
    if len(parts) == 1:
        return {"": prefixes[parts[0]]}
    return {part: prefixes[part] for part in parts} if parts else prefixes


def _write(prefixes: Mapping[str, Prefix], output: Path) -> None:
    """Write one prefix into a file, or several into a folder of files; an error leaves nothing behind."""
    from prefix_runtime.bundle.staging import check_output, staged

    check_output(output)
    if list(prefixes) == [""]:
        prefixes[""].save(output)
        click.echo(f"{output}: {_shown(prefixes[''])}")
        return
    with staged(output) as folder:
        for name, prefix in prefixes.items():
            prefix.save(folder / f"{name}.safetensors")
    for name, prefix in prefixes.items():
        click.echo(f"{output / name}.safetensors: {_shown(prefix)}")


def _shown(prefix: Prefix) -> str:
    """A prefix in one line."""
    begins = f"text from position {prefix.position_base}"
    head = f", head {', '.join(sorted(prefix.head))}" if prefix.head else ""
    if prefix.embeddings is not None:
        return f"soft prompt of {prefix.prefix_length} embeddings{head}"
    sites = ", ".join(f"{site} ({len(layers)} layers)" for site, layers in prefix.sites.items())
    return f"prefix of length {prefix.prefix_length} for {sites}; {begins}; {prefix.nbytes / 1e6:.2f} MB{head}"
