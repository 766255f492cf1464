"""Print the results of `build` and `verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from prefix_runtime.cli.base import line_width, table_width
from prefix_runtime.text_table import as_table, folded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefix_export.build.recipe import BuildResult
    from prefix_export.verify.parity import TaskParity
    from prefix_runtime import Bundle

_WIDTH = 120
"""Characters in a line, and in a pipe."""
_SHOWN_SECONDS = 2.0
"""The summary does not show shorter phases."""


def print_summary(result: BuildResult) -> None:
    """Print the bundle, its comparison with the source framework, and the time of each phase."""
    for line in (_headline(result), phase_line(result.phase_seconds)):
        if line:
            click.echo(folded(line, line_width()))
    width = min(table_width() or _WIDTH, _WIDTH)
    click.echo(f"\n{_task_table(result, width)}")
    if result.quality:
        click.echo(f"\n{_quality_table(result, width)}")


def print_parity(bundle: Bundle, parity: Mapping[str | None, TaskParity]) -> None:
    """Print the comparison with the source framework and the cost of quantization, one line for each task."""
    from prefix_runtime.bundle.certificate import agreement, quality_of

    manifest = bundle.manifest
    for task, result in parity.items():
        line = agreement(asdict(result), quality_of(manifest, task), is_quantized=manifest.quantizer is not None)
        click.echo(folded(f"{'the bare model' if task is None else task}: {line}", line_width()))


def phase_line(seconds: Mapping[str, float]) -> str:
    """The long phases, such as "time: export 12 s, compare 9 s"; empty if there were none."""
    shown = [f"{name} {duration:.0f} s" for name, duration in seconds.items() if duration >= _SHOWN_SECONDS]
    return f"time: {', '.join(shown)}" if shown else ""


def _headline(result: BuildResult) -> str:
    manifest = result.bundle.manifest
    geometry = manifest.geometry
    layer = geometry.layers[0]
    megabytes = sum(entry.size for entry in result.bundle.entries()) / 1e6
    return (
        f"{result.bundle.root}: {manifest.model.name} ({manifest.model.architecture}), {len(geometry.layers)} layers, "
        f"{layer.key_value_heads} key/value heads of {layer.head_dim}, context {geometry.context_length}; "
        f"{manifest.precision}, {megabytes:.1f} MB in {result.seconds:.0f} s"
    )


def _task_table(result: BuildResult, width: int) -> str:
    manifest = result.bundle.manifest
    rows = []
    for task in (*([None] if manifest.mode == "feed" else []), *result.bundle.tasks):
        entry, parity = manifest.tasks[task] if task else None, result.parity.get(task)
        rows.append(
            (
                task or "(no prefix)",
                str(entry.prefix_length) if entry else "0",
                _shown_size(entry.file.size) if entry else "",
                parity.reference if parity else "not compared",
                f"{parity.error:.1e} of {parity.limit:.1e}" if parity else "",
                _shown_tokens(parity) if parity else "",
            )
        )
    on = "agrees, on quantized weights, with" if manifest.quantizer else "agrees with"
    return as_table(("task", "length", "size", on, "logit error, limit", "tokens"), rows, width)


def _quality_table(result: BuildResult, width: int) -> str:
    manifest = result.bundle.manifest
    rows = []
    for task, quality in result.quality.items():
        before, after, change = quality.reference_perplexity, quality.perplexity, quality.perplexity_change
        rows.append(
            (
                task or "(no prefix)",
                quality.held_out,
                str(quality.positions),
                f"{quality.greedy_agreement:.1%}",
                f"{before:.4g} → {after:.4g} ({change:+.1%})" if change is not None else "",
            )
        )
    title = f"what rounding costs: {manifest.precision} weights, {manifest.cache} keys and values, against float32"
    table = as_table(("task", "held-out text", "tokens", "greedy agreement", "perplexity"), rows, width)
    return f"{folded(title, width)}\n{table}"


def _shown_tokens(parity: TaskParity) -> str:
    return f"equal, {parity.ties} ties" if parity.ties else "equal"


def _shown_size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
