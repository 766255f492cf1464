"""Trains one prefix a task with PEFT over the frozen base model, and writes `prefixes/<task>/`.

    python examples/demo/train_prefixes.py --device cuda

The base is read from `model/` as it was saved (float16 weights, computed in float32), so that a
prefix fits the model that it will be used with.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import torch
from batches import TokenizedDocuments, shuffled_rows, tokenize
from corpus import TASKS, task_documents
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
PREFIXES_SEED = 100
"""The first task's seed; each next task's is one more."""
BASE_NAME = "model"
"""What an adapter's config calls its base: the folder's name, as seen from this folder."""


@dataclass(frozen=True)
class PrefixSettings:
    """How one prefix is trained."""

    prefix_length: int
    learning_rate: float
    projection: bool = False
    """Whether the prefix is trained behind PEFT's MLP; it is saved folded either way."""
    documents: int = 16_000
    batch_size: int = 16
    steps: int = 1_000


PREFIXES: Mapping[str, PrefixSettings] = {
    "describe": PrefixSettings(prefix_length=16, learning_rate=2e-3, projection=True),
    "headline": PrefixSettings(prefix_length=4, learning_rate=5e-2),
    "json": PrefixSettings(prefix_length=8, learning_rate=5e-2),
}


def new_prefix(base: Path, settings: PrefixSettings, device: str) -> PeftModel:
    """The frozen base model in float32 with an untrained prefix.

    Raises:
        RuntimeError: if anything but the prefix could be trained.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map=device)
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=settings.prefix_length,
        prefix_projection=settings.projection,
        encoder_hidden_size=model.config.n_embd,
    )
    prefixed = get_peft_model(model, config)
    loose = [
        name
        for name, parameter in prefixed.named_parameters()
        if parameter.requires_grad and not name.startswith("prompt_encoder.")
    ]
    if loose:
        raise RuntimeError(f"the base model must be frozen, but these parameters are not: {loose}")
    return prefixed


def loss_of_batch(model: PeftModel, documents: TokenizedDocuments, rows: Tensor) -> Tensor:
    """The mean cross-entropy over the continuations, which alone depend on the task."""
    token_ids = documents.token_ids[rows]
    labels = documents.labels(rows)
    loss: Tensor = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), labels=labels).loss
    return loss


def train(model: PeftModel, documents: TokenizedDocuments, settings: PrefixSettings, seed: int) -> float:
    """Trains the prefix in place; returns the last loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    batches = shuffled_rows(len(documents), settings.batch_size, torch.Generator().manual_seed(seed))
    model.train()
    with click.progressbar(islice(batches, settings.steps), length=settings.steps) as steps:
        for rows in steps:
            loss = loss_of_batch(model, documents, rows.to(model.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return loss.item()


def save(model: PeftModel, folder: Path) -> None:
    """Writes the adapter without PEFT's model card and without the base's place on this machine."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()


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
        loss = train(model, tokenize(documents, tokenizer, model.device), settings, task_seed)
        save(model, output / task)
        click.echo(f"{task}: loss {loss:.4f}, {steps} steps, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
