"""Scores bundles of the demo, built at several precisions, on held-out tables; prints a table.

    python examples/demo/evaluate_rounded.py

As `evaluate.py`, but what is run is each bundle by the runtime, weights and keys and values as they are rounded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from corpus import TASKS, held_out, prompt
from evaluate import require_unseen
from scoring import Score, score

import prefix_runtime
from prefix_export.build import BuildRequest, build

HERE = Path(__file__).parent
BUILDS: dict[str, dict[str, str | int]] = {
    "float32": {},
    "int8": {"precision": "int8"},
    "int8, keys and values too": {"precision": "int8", "cache": "int8"},
    "int4": {"precision": "int4"},
    "int4, keys and values in int8": {"precision": "int4", "cache": "int8"},
    "int4 in blocks of 128": {"precision": "int4", "block_size": 128},
}


def scores_of(options: dict[str, str | int], tables: int) -> dict[str, Score]:
    """Each task's score under its own prefix, of a bundle that is built so."""
    lights = held_out(tables)
    prompts = [prompt(light) for light in lights]
    prefixes = {task: HERE / "prefixes" / task for task in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bundle"
        build(BuildRequest(str(HERE / "model"), prefixes, output, verify=False, **options))  # type: ignore[arg-type]
        engine = prefix_runtime.load(output)
        texts = {task: [result.text or "" for result in engine.generate(prompts, task=task)] for task in TASKS}
    return {task: score(texts[task], [answer(light) for light in lights]) for task, answer in TASKS.items()}


@click.command()
@click.option("--tables", default=400, show_default=True, help="Number of held-out tables.")
def main(tables: int) -> None:
    """Score bundles of the demo, built at several precisions."""
    require_unseen(held_out(tables))
    click.echo(f"| build | {' | '.join(TASKS)} |\n{'|---' * (len(TASKS) + 1)}|")
    for name, options in BUILDS.items():
        found = scores_of(options, tables).values()
        click.echo(f"| {name} | {' | '.join(f'{s.exact_match_percent:.1f} % ({s.bleu:.1f})' for s in found)} |")


if __name__ == "__main__":
    main()
