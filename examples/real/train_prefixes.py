"""Trains one prefix per task with PEFT on frozen SmolLM2-135M-Instruct and writes `prefixes/<task>/`.

    python examples/real/train_prefixes.py --device cuda
    python examples/real/train_prefixes.py --start build/real/earlier --no-projection --steps 40 --learning-rate 5e-3

It needs torch, transformers, peft, click and numpy. `fetch.py` makes the base folder. The text is the demo's. The saved
adapters hold float16 numbers. At the end of each task the script prints the exact match on held-out tables.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "demo"))

from batches import IGNORED, tokenize  # noqa: E402
from corpus import TASKS, Document, held_out, prompt, task_documents  # noqa: E402
from peft import PeftModel  # noqa: E402
from prefix_training import PrefixSettings, new_prefix, save, train  # noqa: E402

BASE = HERE.parents[1] / "build" / "real" / "smollm2"
BASE_NAME = "smollm2"
PREFIXES = HERE / "prefixes"
SEED = 300
"""The first task's seed; each next task's is one more."""
SETTINGS = PrefixSettings(
    prefix_length=20,
    learning_rate=1e-3,
    projection=True,
    documents=32_000,
    batch_size=32,
    steps=1_200,
    gradient_norm=1.0,
)
WARMUP_SHARE = 0.05
"""Of the steps, while the learning rate rises."""
LOSSES_PER_MEAN = 100
"""Steps whose mean loss is printed as one number."""


def start_from(model: PeftModel, adapter: Path) -> None:
    """Puts a trained prefix into an untrained one without an MLP.

    Raises:
        click.ClickException: the prefix would not be the trained one: it stands behind an MLP, or has another shape.
    """
    [encoder] = model.prompt_encoder.values()
    trained = load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"]
    if encoder.prefix_projection or encoder.embedding.weight.shape != trained.shape:
        raise click.ClickException(
            f"--start: expected --no-projection and a prefix of {list(encoder.embedding.weight.shape)}, "
            f"found {list(trained.shape)} in {adapter}"
        )
    with torch.no_grad():
        encoder.embedding.weight.copy_(trained)


def halve(adapter: Path) -> None:
    """Rewrites an adapter's tensors as float16, which halves the file."""
    tensors = {name: tensor.half() for name, tensor in load_file(adapter).items()}
    save_file(tensors, adapter, metadata={"format": "pt"})


@torch.inference_mode()
def exact_match_percent(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], batch_size: int
) -> float:
    """The share of documents that greedy decoding would write exactly, end token included, in percent.

    Greedy decoding writes an answer exactly if, after the prompt and any part of the answer, the answer's next token
    is the likeliest. One run over each whole document shows that.
    """
    tokenized = tokenize(documents, tokenizer, model.device)
    model.eval()
    exact = 0
    for rows in torch.split(torch.arange(len(tokenized), device=model.device), batch_size):
        token_ids, labels = tokenized.token_ids[rows], tokenized.labels(rows)
        logits = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids)).logits
        likeliest = logits[:, :-1].argmax(-1)  # [rows, longest - 1]
        wanted = labels[:, 1:]
        exact += int(((likeliest == wanted) | (wanted == IGNORED)).all(1).sum())
    return 100 * exact / len(tokenized)


@click.command()
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option("--base", type=click.Path(path_type=Path, exists=True), default=BASE, help="Base model's folder.")
@click.option("--output", type=click.Path(path_type=Path), default=PREFIXES, help="Folder to write.")
@click.option("--tasks", default=",".join(TASKS), show_default=True, help="Tasks to train, with commas between them.")
@click.option("--steps", default=SETTINGS.steps, show_default=True)
@click.option("--documents", default=SETTINGS.documents, show_default=True, help="Training documents per task.")
@click.option("--batch-size", default=SETTINGS.batch_size, show_default=True)
@click.option("--learning-rate", default=SETTINGS.learning_rate, show_default=True)
@click.option("--prefix-length", default=SETTINGS.prefix_length, show_default=True)
@click.option("--projection/--no-projection", default=SETTINGS.projection, show_default=True, help="PEFT's MLP.")
@click.option("--seed", default=SEED, show_default=True, help="The first task's.")
@click.option("--start", type=click.Path(path_type=Path, exists=True), help="Folder of adapters to train further.")
@click.option("--tables", default=64, show_default=True, help="Held-out tables for the exact match at the end.")
def main(
    device: str, base: Path, output: Path, tasks: str, *, start: Path | None, seed: int, tables: int, **changes: Any
) -> None:
    """Train a prefix for every task."""
    torch.set_float32_matmul_precision("high")
    settings = dataclasses.replace(SETTINGS, **changes)
    settings = dataclasses.replace(settings, warmup_steps=round(WARMUP_SHARE * settings.steps))
    tokenizer = AutoTokenizer.from_pretrained(base)
    for task_seed, task in enumerate(TASKS, start=seed):
        if task not in tasks.split(","):
            continue
        started = time.perf_counter()
        torch.manual_seed(task_seed)
        model = new_prefix(base, settings, device)
        if start is not None:
            start_from(model, start / task)
        documents = task_documents(task, settings.documents, seed=task_seed)
        losses = train(model, tokenize(documents, tokenizer, model.device), settings, task_seed)
        save(model, output / task, BASE_NAME)
        halve(output / task / "adapter_model.safetensors")
        means = [fmean(losses[i : i + LOSSES_PER_MEAN]) for i in range(0, len(losses), LOSSES_PER_MEAN)]
        click.echo(f"{task}: losses, means of {LOSSES_PER_MEAN} steps: {' '.join(f'{mean:.4f}' for mean in means)}")
        unseen = [Document(prompt(light), TASKS[task](light)) for light in held_out(tables)]
        exact = exact_match_percent(model, tokenizer, unseen, settings.batch_size)
        click.echo(
            f"{task}: exact match {exact:.1f} % of {tables} held-out tables, {time.perf_counter() - started:.0f} s"
        )


if __name__ == "__main__":
    main()
