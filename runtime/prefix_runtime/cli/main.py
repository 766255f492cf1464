"""`prefix-runtime`, the command line of the device: flags and printed text, nothing else.

The commands are plain `click` objects; `prefix_export.cli.main` offers those that need no more than the runtime as its
own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from prefix_runtime import __version__
from prefix_runtime.errors import RequestError

from .base import PATH as BUNDLE
from .base import ErrorReportingGroup, expanded, print_fields
from .bench import bench

if TYPE_CHECKING:
    from prefix_runtime.bundle.folder import Bundle
    from prefix_runtime.bundle.manifest import Manifest
    from prefix_runtime.engine import Engine
    from prefix_runtime.generation.arguments import GenerationOptions
    from prefix_runtime.generation.generation_config import GenerationConfig
    from prefix_runtime.generation.results import GenerationResult
    from prefix_runtime.prefix.prefix import Prefix

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@click.group(cls=ErrorReportingGroup)
@click.version_option(__version__)
def main() -> None:
    """Run a frozen model under trained prefixes, one per task."""


@main.command()
@click.argument("path", type=BUNDLE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Say what the bundle or prefix file at PATH holds."""
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
@click.option("--remove", is_flag=True, help="Remove what was kept instead.")
def prepare(bundle: Path, remove: bool) -> None:
    """Keep BUNDLE's graph as onnxruntime packs it for this processor, so that it opens faster from now on.

    It is kept in the user's cache folder, or in PREFIX_RUNTIME_CACHE, and takes about twice the bundle's size. Of a
    bundle of a gigabyte or more the first opening does so by itself, unless its weights have 4 bits. What was kept
    before is compared with its SHA-256.
    """
    from prefix_runtime.bundle.folder import Bundle

    opened = Bundle.open(bundle)
    from prefix_runtime.backends.onnxruntime import (
        automatic_packing as packing,  # after the bundle was found, as it imports onnxruntime
    )

    if remove:
        click.echo(f"removed what was kept of {bundle}" if packing.discard_packed(opened) else "nothing was kept")
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


@main.command()
@click.argument("bundle", type=BUNDLE)
@click.argument("prompt", required=False)
@click.option("--token-ids", metavar="IDS", help="Token ids with commas between them, in place of PROMPT.")
@click.option("--task", "names", multiple=True, help="Whose prefix to use; repeat to compare. Default: the bare model.")
@click.option("--max-new-tokens", type=int, help="New tokens at most. Default: the model's, or else 256.")
@click.option("--temperature", type=float, help="0 takes the most likely token. Default: the model's, or else 0.")
@click.option("--top-k", type=int, help="Keep the k most likely tokens. Default: the model's, or else all.")
@click.option(
    "--top-p", type=float, help="Keep tokens that make up this probability. Default: the model's, or else all."
)
@click.option(
    "--min-p", type=float, help="Keep tokens this likely against the best. Default: the model's, or else all."
)
@click.option("--repetition-penalty", type=float, help="Above 1 discourages. Default: the model's, or else 1.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, help="End before this text; repeatable. Default: the model's.")
@click.option(
    "--end-token",
    "ends",
    multiple=True,
    metavar="ID|TOKEN",
    help="End at this token; repeatable. Default: the model's.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=JSON",
    help="Another setting of generation_config.json, such as min_new_tokens=5; null turns it off. Repeatable.",
)
@click.option(
    "--provider",
    default="cpu",
    show_default=True,
    help="Execution provider: cpu, cuda, tensorrt, tensorrt-rtx; tensorrt-engine runs an engine of the bundle.",
)
@click.option("--threads", type=int, help="Of one run. Default: onnxruntime's choice.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a task when it is done, do not stream.")
@click.option("--metrics/--no-metrics", default=None, help="Print latencies to stderr. Default: on a terminal.")
def generate(bundle: Path, prompt: str | None, token_ids: str | None, names: tuple[str, ...], **flags: Any) -> None:
    """Answer PROMPT with BUNDLE, streaming; without PROMPT it is read from standard input."""
    if prompt is not None and token_ids is not None:
        raise click.UsageError("give either PROMPT or --token-ids")
    settings = _settings(flags["settings"])
    _check_generation(bundle, names, flags)
    request = _prompt(prompt, token_ids)

    from prefix_runtime.engine import load  # after the checks, as it imports onnxruntime

    # A large bundle's graph is kept, for seconds, at the first opening.
    with _log_on_stderr():
        engine = load(bundle, provider=flags["provider"], threads=flags["threads"])
    options = _options(flags, settings, engine)
    show_metrics = sys.stderr.isatty() if flags["metrics"] is None else flags["metrics"]
    for name in names or (None,):
        if flags["as_json"]:
            click.echo(json.dumps(_as_json(engine.generate(**request, task=name, **options))))
            continue
        if len(names) > 1:
            click.echo(click.style(f"── {name}", bold=True))
        result = _print_stream(engine, request, name, options)
        if show_metrics:
            click.echo(click.style(_metrics_line(result), dim=True), err=True)


main.add_command(bench)


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("prefix_runtime"), _Echo()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def add_to_bundle(bundle: Path, prefix: str, read: Callable[[Path, Bundle], Prefix]) -> None:
    """Add what `read` makes of `[TASK=]PATH` to a bundle and print that; the name is checked first."""
    from prefix_runtime.bundle.folder import Bundle
    from prefix_runtime.bundle.manifest import check_new_task_name

    name, path = split_task(prefix)
    opened = Bundle.open(bundle)
    opened.check_folder_may_change()
    check_new_task_name(name, opened.manifest.tasks)
    opened.add_task(name, read(path, opened))
    click.echo(f"added {name} to {bundle}")


def split_task(text: str) -> tuple[str, Path]:
    """The task and the path in `[TASK=]PATH`; without a task the file's or the folder's name."""
    name, path = split_named(text)
    if name is not None:
        return name, path
    # A Hub id may have a revision behind it, which names no task.
    told = path if path.exists() else Path(str(path).partition("@")[0])
    # PEFT's file is called alike in every folder: the folder's name tells more.
    named = told.absolute().parent if told.stem == "adapter_model" else told.absolute()
    return (named.name if told.is_dir() or named != told.absolute() else named.stem), path


def split_named(text: str) -> tuple[str | None, Path]:
    """The task, or None, and the path in `[TASK=]PATH`; a path that is there and has a `=` in it is a path."""
    name, separator, rest = text.partition("=")
    if not separator or os.path.exists(text):  # noqa: PTH110  # Path's raises where the name is too long for one
        return None, Path(expanded(text))
    if not rest:
        raise click.UsageError(f"expected [TASK=]PATH, found {text!r} without a path")
    return name, Path(expanded(rest))


def verified(bundle: Bundle) -> str:
    """Verify a bundle's hashes and prefixes; returns the line that says so."""
    bundle.verify()
    for name in bundle.tasks:
        bundle.prefix(name)
    return f"{bundle.root}: {len(bundle.entries())} files and {len(bundle.tasks)} prefixes are as the manifest says"


def print_bundle(bundle: Bundle, as_json: bool) -> None:
    """Print what a bundle holds."""
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


def _prompt(prompt: str | None, token_ids: str | None) -> dict[str, Any]:
    if token_ids is not None:
        try:
            return {"token_ids": [int(part) for part in token_ids.split(",")]}
        except ValueError as error:
            raise RequestError(
                f"--token-ids: expected whole numbers with commas between, found {token_ids!r}"
            ) from error
    if prompt is None:
        try:
            prompt = sys.stdin.read().removesuffix("\n")  # the one that ends a line of text, not part of it
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input: expected UTF-8 text, found {error}") from error
    return {"prompt": prompt}


def _check_generation(bundle: Path, names: tuple[str, ...], flags: dict[str, Any]) -> None:
    """Refuse what a bundle cannot run, before onnxruntime is imported and the prompt is read."""
    from prefix_runtime.backends.options import check_threads
    from prefix_runtime.backends.registry import check_fits
    from prefix_runtime.bundle.folder import Bundle
    from prefix_runtime.bundle.tasks import TaskStore
    from prefix_runtime.checks import is_whole
    from prefix_runtime.generation.arguments import as_stop
    from prefix_runtime.generation.sampling import Sampling

    as_stop(flags["stop"])
    Sampling(**{name: flags[name] for name in _SAMPLING if flags[name] is not None})
    if flags["max_new_tokens"] is not None and not is_whole(flags["max_new_tokens"], 1):
        raise RequestError(f"max_new_tokens: expected a whole number, 1 or more, found {flags['max_new_tokens']}")
    if flags["threads"] is not None:
        check_threads(flags["threads"])
    opened = Bundle.open(bundle)
    check_fits(flags["provider"], opened)
    store = TaskStore(opened)
    for name in names:
        store.get(name)


def _settings(given: tuple[str, ...]) -> dict[str, Any]:
    """The settings of `NAME=JSON` texts."""
    found: dict[str, Any] = {}
    for text in given:
        name, separator, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            separator = ""
        if not separator:
            raise click.UsageError(f"--set: expected NAME=VALUE with a value in JSON, found {text[:80]!r}")
    return found


def _options(flags: dict[str, Any], settings: dict[str, Any], engine: Engine) -> GenerationOptions:
    chosen = {name: flags[name] for name in _SAMPLING if flags[name] is not None}
    config = cast("GenerationConfig", settings)
    return {
        "max_new_tokens": flags["max_new_tokens"],
        "sampling": replace(engine.generation_defaults(config).sampling, **chosen) if chosen else None,
        "stop": flags["stop"] or None,
        "end_tokens": [int(end) if end.isdecimal() else engine.token_id(end) for end in flags["ends"]] or None,
        "generation_config": config,
    }


def _print_stream(
    engine: Engine, request: dict[str, Any], task: str | None, options: GenerationOptions
) -> GenerationResult:
    for chunk in engine.stream(**request, task=task, **options):
        click.echo(chunk.text, nl=False)
    assert chunk.result is not None  # the last chunk's
    if chunk.result.text is None:
        click.echo(",".join(map(str, chunk.result.token_ids)), nl=False)
    click.echo()
    return chunk.result


def _metrics_line(result: GenerationResult) -> str:
    metrics = result.metrics
    steps = f", then {metrics.inter_token_latency * 1e3:.2f} ms a token" if metrics.inter_token_latencies else ""
    return (
        f"   first token {metrics.time_to_first_token * 1e3:.1f} ms{steps}; prefix {metrics.prefix_length}, "
        f"prompt {metrics.prompt_length}, {metrics.new_tokens} new tokens ({result.finish_reason})"
    )


def _as_json(result: GenerationResult) -> dict[str, Any]:
    metrics = result.metrics
    return {
        "task": result.task,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "metrics": {
            **asdict(metrics),
            "inter_token_latency": metrics.inter_token_latency if metrics.inter_token_latencies else None,
            "tokens_per_second": metrics.tokens_per_second,
        },
    }
