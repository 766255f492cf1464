"""`prefix-export bench`: the runtime's command, and also models with random weights. It imports torch only then."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefix_runtime.cli.base import HUB_ID_OR_PATH, PATH
from prefix_runtime.cli.bench import bench_options, check_bundle, check_flags, progress, run

from .console import libraries_quiet

if TYPE_CHECKING:
    from prefix_runtime.bench.run import StepListener

_BUILD_OPTIONS = ("target", "precision", "block_size", "cache")


@click.command()
@click.argument("bundle", type=PATH, required=False)
@click.option(
    "--model",
    type=HUB_ID_OR_PATH,
    help="Measure a model instead of BUNDLE: a known model, a folder with a config.json, a GGUF file, or a Hub id.",
)
@click.option("--revision", help="Branch, tag or commit of the Hub id in --model.")
@click.option("--random", is_flag=True, help="With --model: use random weights; only the configuration is needed.")
@click.option("--target", help="With --model: target of the graph, as for build. Default: cpu.")
@click.option("--precision", help="With --model: precision of the weights. Default: fp32; for cuda fp16.")
@click.option("--block-size", type=int, help="With --model: number of weights that share a scale.")
@click.option("--cache", help="With --model: type of cached keys and values. Default: fp32; for cuda as the weights.")
@bench_options
def bench(bundle: Path | None, model: str | None, revision: str | None, random: bool, **flags: Any) -> None:
    """Measure BUNDLE, or a model's geometry with random weights, at several prefix lengths, in interleaved rounds.

    Prints time to first token, inter-token latency, tokens per second beside the limit of memory bandwidth, the
    overhead against no prefix, and the cost of selecting a task and of opening the bundle.

    --random knows these models without the network: distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2-xl, TinyLlama 1.1B,
    Llama 3.2 1B and 3B, SmolLM2 135M, Qwen2.5 0.5B and 1.5B, by their Hub ids, and llama-8b.
    """
    from prefix_export.models.hub import with_revision

    model = with_revision(model, revision)
    _check_usage(bundle, model, random, flags)
    check_flags(flags)
    if bundle is not None:
        check_bundle(bundle, flags)
        with progress() as on_step:
            run(bundle, flags, on_step)
        return
    assert model is not None  # by the check
    options = {name: flags[name] for name in _BUILD_OPTIONS if flags[name] is not None}
    _check_build(model, options)
    with progress() as on_step, _random_bundle(model, options, on_step) as built:
        run(built, flags, on_step)


def _check_usage(bundle: Path | None, model: str | None, random: bool, flags: dict[str, Any]) -> None:
    if (bundle is None) == (model is None):
        raise click.UsageError("name either BUNDLE or --model")
    if model is not None and not random:
        raise click.UsageError("--model needs --random; to measure trained weights, make a BUNDLE with: build")
    if random and flags["tasks"]:
        raise click.UsageError("--task goes with BUNDLE; a model with random weights has no tasks")
    options = [name for name in _BUILD_OPTIONS if flags[name] is not None]
    if bundle is not None and (random or options):
        option = "--random" if random else f"--{options[0].replace('_', '-')}"
        raise click.UsageError(f"{option} goes with --model; BUNDLE is measured as it is")


def _check_build(model: str, options: dict[str, Any]) -> None:
    """Refuse a model whose path does not exist, and options of the build that contradict each other."""
    from prefix_export.build.request import BuildRequest, check_request
    from prefix_export.models.names import check_model

    check_model(model)
    with tempfile.TemporaryDirectory() as folder:
        check_request(BuildRequest(model, {}, Path(folder) / "random-weights", **options, verify=False))


@contextmanager
def _random_bundle(model: str, options: dict[str, Any], on_step: StepListener) -> Iterator[Path]:
    """A temporary bundle of a model with random weights, within the block."""
    with tempfile.TemporaryDirectory(prefix="prefix-export-bench-") as name:
        folder = Path(name)
        with libraries_quiet():
            from prefix_export.build.random_bundle import build_random
            from prefix_export.build.recipe import BuildRequest

            request = BuildRequest(model, {}, folder / "random-weights", **options)
            build_random(request, progress=_BuildingFirst(on_step))
        yield folder / "random-weights"


class _BuildingFirst:
    """Shows the phases of the build in the bench's line before the first step; implements `Progress`."""

    def __init__(self, on_step: StepListener) -> None:
        self._on_step = on_step

    def phase(self, name: str, *_: Any, **_options: Any) -> None:
        self._on_step(0, 0, name)

    def advance(self, steps: float = 1) -> None:
        pass
