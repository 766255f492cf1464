"""The command `generate`: its options and output."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from prefix_runtime.errors import RequestError

from .base import PATH as BUNDLE

if TYPE_CHECKING:
    from prefix_runtime.engine import Engine
    from prefix_runtime.generation.arguments import GenerationOptions
    from prefix_runtime.generation.generation_config import GenerationConfig
    from prefix_runtime.generation.results import GeneratedSequence, GenerationResult
    from prefix_runtime.generation.sampling import Sampling

_BEAMS = ("num_beams", "num_return_sequences", "length_penalty")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@click.command()
@click.argument("bundle", type=BUNDLE)
@click.argument("prompt", required=False)
@click.option("--token-ids", metavar="IDS", help="Comma-separated token ids instead of PROMPT.")
@click.option("--task", "names", multiple=True, help="Task to use; repeat to compare. Default: the bare model.")
@click.option("--max-new-tokens", type=int, help="Maximum number of new tokens. Default: the model's, otherwise 256.")
@click.option("--temperature", type=float, help="0 takes the most likely token. Default: the model's, otherwise 0.")
@click.option("--top-k", type=int, help="Sample from the k most likely tokens. Default: the model's, otherwise all.")
@click.option(
    "--top-p",
    type=float,
    help="Sample from the most likely tokens with this total probability. Default: the model's, otherwise all.",
)
@click.option(
    "--min-p",
    type=float,
    help="Sample from tokens at least this likely relative to the best. Default: the model's, otherwise all.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    help="Above 1 makes repeated tokens less likely. Default: the model's, otherwise 1.",
)
@click.option("--seed", type=int, help="Seed of sampling, for repeatable text.")
@click.option("--num-beams", type=int, help="Beams of a beam search; 1 for none. Default: the model's, otherwise 1.")
@click.option(
    "--num-return-sequences",
    type=int,
    help="Number of texts from a beam search, best first. Default: the model's, otherwise 1.",
)
@click.option(
    "--length-penalty",
    type=float,
    help="With beams: above 0 favours long texts. Default: the model's, otherwise 1.",
)
@click.option("--stop", multiple=True, help="End before this text. Repeatable. Default: the model's.")
@click.option(
    "--end-token",
    "ends",
    multiple=True,
    metavar="ID|TOKEN",
    help="End at this token. Repeatable. Default: the model's.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=JSON",
    help="Any other setting of generation_config.json, such as min_new_tokens=5; null turns it off. Repeatable.",
)
@click.option(
    "--provider",
    default="cpu",
    show_default=True,
    help="Execution provider: cpu, cuda, tensorrt, tensorrt-rtx; tensorrt-engine runs the bundle's TensorRT engine.",
)
@click.option("--threads", type=int, help="CPU threads for one run. Default: onnxruntime decides.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per task at its end, without streaming.")
@click.option("--metrics/--no-metrics", default=None, help="Print latencies to stderr. Default: only on a terminal.")
def generate(bundle: Path, prompt: str | None, token_ids: str | None, names: tuple[str, ...], **flags: Any) -> None:
    """Generate text from PROMPT with BUNDLE. Without PROMPT, the command reads standard input.

    The text streams. With beams, the command prints it when the search has ended, and several texts with their scores.
    """
    if prompt is not None and token_ids is not None:
        raise click.UsageError("use either PROMPT or --token-ids")
    settings = _settings(flags["settings"])
    _check_generation(bundle, names, flags)
    request = _prompt(prompt, token_ids)

    from prefix_runtime.engine import load  # after the checks, as it imports onnxruntime

    # The first opening of a large bundle takes seconds longer, because the runtime packs a copy of its graph.
    with _log_on_stderr():
        engine = load(bundle, provider=flags["provider"], threads=flags["threads"])
    options = _options(flags, settings, engine)
    show_metrics = sys.stderr.isatty() if flags["metrics"] is None else flags["metrics"]
    for name in names or (None,):
        if flags["as_json"]:
            click.echo(json.dumps(_as_json(engine.generate(**request, task=name, **options))))
            continue
        title = [name] if name is not None and len(names) > 1 else []
        if _is_searched(engine, options):
            result = engine.generate(**request, task=name, **options)
            _print_sequences(result, title)
        else:
            _print_title(title)
            result = _print_stream(engine, request, name, options)
        if show_metrics:
            click.echo(click.style(_metrics_line(result), dim=True), err=True)


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
            prompt = sys.stdin.read().removesuffix("\n")  # a newline at the end is not part of the prompt
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input: expected UTF-8 text, found {error}") from error
    return {"prompt": prompt}


def _check_generation(bundle: Path, names: tuple[str, ...], flags: dict[str, Any]) -> None:
    """Check the options before onnxruntime is imported and the prompt is read."""
    from prefix_runtime.backends.options import check_threads
    from prefix_runtime.backends.registry import check_fits
    from prefix_runtime.bundle.folder import Bundle
    from prefix_runtime.bundle.tasks import TaskStore
    from prefix_runtime.checks import is_whole
    from prefix_runtime.generation.arguments import as_stop
    from prefix_runtime.generation.generation_config import GenerationDefaults
    from prefix_runtime.generation.sampling import Sampling

    as_stop(flags["stop"])
    Sampling(**{name: flags[name] for name in _SAMPLING if flags[name] is not None})
    if flags["max_new_tokens"] is not None and not is_whole(flags["max_new_tokens"], 1):
        raise RequestError(f"max_new_tokens: expected a whole number, 1 or more, found {flags['max_new_tokens']}")
    if flags["threads"] is not None:
        check_threads(flags["threads"])
    opened = Bundle.open(bundle)
    beams = {name: flags[name] for name in _BEAMS}
    GenerationDefaults.of_config(beams, opened.manifest.geometry.vocab_size)
    check_fits(flags["provider"], opened)
    store = TaskStore(opened)
    for name in names:
        store.get(name)


def _settings(texts: tuple[str, ...]) -> dict[str, Any]:
    """The settings in texts `NAME=JSON`."""
    settings: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        try:
            settings[name] = json.loads(value)
        except (ValueError, RecursionError):
            separator = ""
        if not separator:
            raise click.UsageError(f"--set: expected NAME=VALUE with a value in JSON, found {text[:80]!r}")
    return settings


def _options(flags: dict[str, Any], settings: dict[str, Any], engine: Engine) -> GenerationOptions:
    chosen = {name: flags[name] for name in _SAMPLING if flags[name] is not None}
    config = cast("GenerationConfig", settings)
    return {
        "max_new_tokens": flags["max_new_tokens"],
        "sampling": replace(engine.generation_defaults(config).sampling, **chosen) if chosen else None,
        "stop": flags["stop"] or None,
        "end_tokens": [int(end) if end.isdecimal() else engine.token_id(end) for end in flags["ends"]] or None,
        "generation_config": config,
        "num_beams": flags["num_beams"],
        "num_return_sequences": flags["num_return_sequences"],
        "length_penalty": flags["length_penalty"],
    }


def _is_searched(engine: Engine, options: GenerationOptions) -> bool:
    """Whether the request is a beam search, whose text cannot be streamed."""
    defaults = engine.generation_defaults(cast("GenerationConfig | None", options["generation_config"]))
    sampling = cast("Sampling | None", options["sampling"]) or defaults.sampling
    requested = options["num_beams"]
    return (requested or defaults.num_beams) > 1 and (sampling.is_greedy or requested is not None)


def _print_title(parts: list[str]) -> None:
    if parts:
        click.echo(click.style(f"── {', '.join(parts)}", bold=True))


def _print_sequences(result: GenerationResult, title: list[str]) -> None:
    for place, sequence in enumerate(result.sequences, 1):
        count = len(result.sequences)
        _print_title([*title, *([f"{place} of {count}", f"score {sequence.score:.4f}"] if count > 1 else [])])
        click.echo(sequence.text if sequence.text is not None else ",".join(map(str, sequence.token_ids)))


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
        **({"score": result.score, "sequences": list(map(_sequence, result.sequences))} if result.sequences else {}),
        "metrics": {
            **asdict(metrics),
            "inter_token_latency": metrics.inter_token_latency if metrics.inter_token_latencies else None,
            "tokens_per_second": metrics.tokens_per_second,
        },
    }


def _sequence(sequence: GeneratedSequence) -> dict[str, Any]:
    shown = asdict(sequence)
    del shown["token_logprobs"]  # there is no option for them
    return shown
