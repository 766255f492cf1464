"""`prefix-export bench`: the runtime's command, and models that have no weights yet. Torch is imported inside of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefix_runtime.bench_cli import bench_options, check_flags, progress, run

if TYPE_CHECKING:
    from prefix_runtime.bench import StepListener

_BUILD_OPTIONS = ("target", "precision", "block_size", "cache")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--model", help="In place of BUNDLE: a known model, a folder with a config.json, a GGUF file, or a Hub id."
)
@click.option("--revision", help="Of a Hub id given as --model.")
@click.option("--random", is_flag=True, help="With --model: random weights, so that none are needed.")
@click.option("--target", help="With --model: what the graph is made for, as of build. Default: cpu.")
@click.option("--precision", help="With --model: of the weights. Default: fp32; for cuda fp16.")
@click.option("--block-size", type=int, help="With --model: weights that share a scale.")
@click.option("--cache", help="With --model: type of the key/value buffers. Default: fp32; for cuda as the weights.")
@bench_options
def bench(bundle: Path | None, model: str | None, revision: str | None, random: bool, **flags: Any) -> None:
    """Measure BUNDLE, or a model's geometry with random weights, at several prefix lengths, in interleaved rounds.

    Prints time to first token, inter-token latency and tokens a second beside what reading memory allows, the overhead
    against no prefix, the cost of selecting a task and of opening the bundle.

    Models that --random knows without the network: distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2-xl, TinyLlama 1.1B,
    Llama 3.2 1B and 3B, SmolLM2 135M, Qwen2.5 0.5B and 1.5B, by their Hub ids, and llama-8b.
    """
    from .hub import with_revision

    model = with_revision(model, revision)
    _check_usage(bundle, model, random, flags)
    check_flags(flags)
    with progress() as on_step:
        if bundle is not None:
            run(bundle, flags, on_step)
            return
        assert model is not None  # by the check
        options = {name: flags[name] for name in _BUILD_OPTIONS if flags[name] is not None}
        with _random_bundle(model, options, on_step) as built:
            run(built, flags, on_step)


def _check_usage(bundle: Path | None, model: str | None, random: bool, flags: dict[str, Any]) -> None:
    if (bundle is None) == (model is None):
        raise click.UsageError("give either BUNDLE or --model")
    if model is not None and not random:
        raise click.UsageError("--model needs --random; to measure trained weights give BUNDLE, made by: build")
    if random and flags["tasks"]:
        raise click.UsageError("--task goes with BUNDLE; a model with random weights has no tasks")
    given = [name for name in _BUILD_OPTIONS if flags[name] is not None]
    if bundle is not None and (random or given):
        option = "--random" if random else f"--{given[0].replace('_', '-')}"
        raise click.UsageError(f"{option} goes with --model; BUNDLE is measured as it is")


@contextmanager
def _random_bundle(model: str, options: dict[str, Any], on_step: StepListener) -> Iterator[Path]:
    """A bundle of a model with random weights, for as long as the block lasts."""
    from prefix_runtime.cli import cleaning_up_when_terminated

    from .cli import libraries_quiet

    with cleaning_up_when_terminated(), tempfile.TemporaryDirectory(prefix="prefix-export-bench-") as name:
        folder = Path(name)
        with libraries_quiet():
            from .build import BuildRequest
            from .random_bundle import build_random

            request = BuildRequest(model, {}, folder / "random-weights", **options)
            build_random(request, on_step=lambda step: on_step(0, 0, step))
        yield folder / "random-weights"
