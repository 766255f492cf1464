"""Scores the saved model and prefixes on held-out tables and writes `results.json`.

    python examples/demo/evaluate.py

Prints a table: a row a condition (no prefix, or one task's), a column a kind of continuation. What was
generated under a condition, greedily and in float32, is compared with every kind's one right answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import click
import torch
from corpus import KINDS, TASKS, Lighthouse, held_out, prompt, training
from peft import PeftModel
from scoring import LanguageModel, Score, continuations, score
from train_model import ModelSettings
from train_prefixes import PREFIXES, PREFIXES_SEED
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).parent
NO_PREFIX = "none"
BATCH_SIZE = 64
UNBATCHED_SAMPLE = 20
"""Prompts a condition that are also generated alone, to see that batching changes nothing."""


def require_unseen(lights: Sequence[Lighthouse]) -> None:
    """Draws all the training text anew and compares.

    Raises:
        RuntimeError: if a name of `lights`, and so perhaps a table, occurs in any of it.
    """
    seen = {light.name for light in training(ModelSettings.documents, seed=ModelSettings.seed)}
    for seed, settings in enumerate(PREFIXES.values(), start=PREFIXES_SEED):
        seen |= {light.name for light in training(settings.documents, seed=seed)}
    leaked = sorted(seen & {light.name for light in lights})
    if leaked:
        raise RuntimeError(f"held-out names must not occur in training, but these do: {leaked}")


def load(condition: str, device: str) -> LanguageModel:
    """The saved base model in float32, with the saved prefix of the task `condition`, if it is one."""
    base = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32, device_map=device)
    if condition == NO_PREFIX:
        return cast(LanguageModel, base)
    return cast(LanguageModel, PeftModel.from_pretrained(base, HERE / "prefixes" / condition))


def scores_of(
    condition: str, tokenizer: PreTrainedTokenizerBase, lights: Sequence[Lighthouse], device: str
) -> dict[str, Score]:
    """The score of one condition for each kind of continuation.

    Raises:
        RuntimeError: if prompts in batches give other texts than prompts alone.
    """
    model = load(condition, device)
    prompts = [prompt(light) for light in lights]
    texts = continuations(model, tokenizer, prompts, batch_size=BATCH_SIZE)
    alone = continuations(model, tokenizer, prompts[:UNBATCHED_SAMPLE], batch_size=1)
    if alone != texts[:UNBATCHED_SAMPLE]:
        raise RuntimeError(f"batching changed what is generated under {condition!r}")
    return {kind: score(texts, [answer(light) for light in lights]) for kind, answer in KINDS.items()}


def as_markdown(scores: Mapping[str, Mapping[str, Score]]) -> str:
    """A Markdown table: a row a condition, a column a kind, each cell exact match and BLEU."""
    lines = [f"| prefix | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for condition, by_kind in scores.items():
        cells = (f"{s.exact_match_percent:.1f} % ({s.bleu:.1f})" for s in by_kind.values())
        lines.append(f"| {condition} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option("--tables", default=400, show_default=True, help="Number of held-out tables.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results.json")
def main(device: str, tables: int, output: Path) -> None:
    """Score the demo's saved model and prefixes on held-out tables."""
    lights = held_out(tables)
    require_unseen(lights)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    scores = {c: scores_of(c, tokenizer, lights, device) for c in (NO_PREFIX, *TASKS)}
    results = {
        "held_out_tables": len(lights),
        "decoding": "greedy, float32",
        "prefix_lengths": {task: settings.prefix_length for task, settings in PREFIXES.items()},
        "scores": {c: {kind: asdict(s) for kind, s in by_kind.items()} for c, by_kind in scores.items()},
    }
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    click.echo(as_markdown(scores))


if __name__ == "__main__":
    main()
