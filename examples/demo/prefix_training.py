"""One prefix that PEFT trains over a frozen base model; the demo and `examples/real` share it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import torch
from batches import TokenizedDocuments, learning_rate, shuffled_rows
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM


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
    warmup_steps: int = 0
    gradient_norm: float = math.inf
    """Largest norm of a step's gradient; a larger gradient is scaled down to it."""


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
        encoder_hidden_size=model.config.hidden_size,
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
    """The mean cross-entropy over the continuations, which alone depend on the task.

    Padding is on the right, where a causal model cannot see it, so nothing is masked.
    """
    token_ids = documents.token_ids[rows]
    labels = documents.labels(rows)
    loss: Tensor = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), labels=labels).loss
    return loss


def train(model: PeftModel, documents: TokenizedDocuments, settings: PrefixSettings, seed: int) -> list[float]:
    """Trains the prefix in place; returns each step's loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, settings.steps, settings.warmup_steps)
    )
    batches = shuffled_rows(len(documents), settings.batch_size, torch.Generator().manual_seed(seed))
    losses = []
    model.train()
    with click.progressbar(islice(batches, settings.steps), length=settings.steps) as steps:
        for rows in steps:
            loss = loss_of_batch(model, documents, rows.to(model.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, settings.gradient_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


def save(model: PeftModel, folder: Path, base_name: str) -> None:
    """Writes the adapter without PEFT's model card and without the base's place on this machine."""
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()
