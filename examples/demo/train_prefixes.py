"""Trains one prefix a task with PEFT over the frozen base model, and writes `prefixes/<task>/`.

    python examples/demo/train_prefixes.py --device cuda

The base is read from `model/` as it was saved (float16 weights, computed in float32), so that a
prefix fits the model that it will be used with.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from batches import tokenize
from corpus import TASKS, task_documents
from prefix_training import PrefixSettings, new_prefix, save, train
from transformers import AutoTokenizer

HERE = Path(__file__).parent
PREFIXES_SEED = 100
"""The first task's seed; each next task's is one more."""
BASE_NAME = "model"
"""What an adapter's config calls its base: the folder's name, as seen from this folder."""

PREFIXES: Mapping[str, PrefixSettings] = {
    "describe": PrefixSettings(prefix_length=16, learning_rate=2e-3, projection=True),
    "headline": PrefixSettings(prefix_length=4, learning_rate=5e-2),
    "json": PrefixSettings(prefix_length=8, learning_rate=5e-2),
}


@click.command()
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option("--seed", default=PREFIXES_SEED, show_default=True, help="The first task's.")
@click.option("--steps", default=PrefixSettings.steps, show_default=True)
@click.option("--base", type=click.Path(path_type=Path), default=HERE / "model", help="Base model's folder.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "prefixes", help="Folder to write.")
def main(device: str, seed: int, steps: int, base: Path, output: Path) -> None:
    """Train a prefix for every task."""
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(base)
    for task_seed, task in enumerate(TASKS, start=seed):
        started = time.perf_counter()
        torch.manual_seed(task_seed)
        settings = dataclasses.replace(PREFIXES[task], steps=steps)
        model = new_prefix(base, settings, device)
        documents = task_documents(task, settings.documents, seed=task_seed)
        losses = train(model, tokenize(documents, tokenizer, model.device), settings, task_seed)
        save(model, output / task, BASE_NAME)
        click.echo(f"{task}: loss {losses[-1]:.4f}, {steps} steps, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
