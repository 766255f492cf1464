"""Trains the demo's tokenizer and its base model, a small GPT-2, from nothing, and writes `model/`.

    python examples/demo/train_model.py --device cuda

The text shows four kinds of continuation after the same kind of table and no cue of which comes;
see `corpus.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import torch
from batches import TokenizedDocuments, learning_rate, shuffled_rows, tokenize
from corpus import END_OF_TEXT, SEPARATOR, Document, mixed_documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent


@dataclass(frozen=True)
class ModelSettings:
    """What the base model is and how it is trained."""

    vocab_size: int = 1024
    context: int = 256
    width: int = 192
    layers: int = 4
    heads: int = 6
    documents: int = 200_000
    tokenizer_documents: int = 20_000
    batch_size: int = 128
    steps: int = 10_000
    warmup_steps: int = 500
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    seed: int = 1


def train_tokenizer(documents: Iterable[Document], settings: ModelSettings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that never joins the separator or a digit with a neighbour."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SEPARATOR), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.prompt + d.continuation for d in documents), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


def new_model(settings: ModelSettings, end_of_text_id: int) -> GPT2LMHeadModel:
    """An untrained GPT-2 in float32, without dropout: the text is too varied to learn by heart."""
    config = GPT2Config(
        vocab_size=settings.vocab_size,
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
        pad_token_id=end_of_text_id,
    )
    return GPT2LMHeadModel(config)


def loss_of_batch(model: GPT2LMHeadModel, documents: TokenizedDocuments, rows: Tensor) -> Tensor:
    """The mean cross-entropy of the continuations, each document at a random place of the context.

    A prefix of any length will move the text, so every position must be trained as a first one.
    """
    spare = model.config.n_positions - documents.longest
    starts = torch.randint(spare + 1, (len(rows), 1)).to(rows.device)
    positions = starts + torch.arange(documents.longest, device=rows.device)  # [rows, longest]
    labels = documents.labels(rows)
    token_ids = documents.token_ids[rows]
    everything = torch.ones_like(token_ids)  # padding is on the right, where a causal model cannot see it
    loss: Tensor = model(input_ids=token_ids, attention_mask=everything, position_ids=positions, labels=labels).loss
    return loss


def train(model: GPT2LMHeadModel, documents: TokenizedDocuments, settings: ModelSettings) -> float:
    """Trains `model` in place; returns the last loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, settings.steps, settings.warmup_steps)
    )
    batches = shuffled_rows(len(documents), settings.batch_size, torch.Generator().manual_seed(settings.seed))
    model.train()
    with click.progressbar(islice(batches, settings.steps), length=settings.steps) as steps:
        for rows in steps:
            loss = loss_of_batch(model, documents, rows.to(model.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return loss.item()


@click.command()
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option("--seed", default=ModelSettings.seed, show_default=True)
@click.option("--steps", default=ModelSettings.steps, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "model", help="Folder to write.")
def main(device: str, seed: int, steps: int, output: Path) -> None:
    """Train the demo's tokenizer and base model."""
    settings = ModelSettings(seed=seed, steps=steps)
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    started = time.perf_counter()
    documents = mixed_documents(settings.documents, seed=settings.seed)
    tokenizer = train_tokenizer(documents[: settings.tokenizer_documents], settings)
    model = new_model(settings, tokenizer.eos_token_id)
    model.to(device)  # type: ignore[arg-type]
    loss = train(model, tokenize(documents, tokenizer, model.device), settings)
    tokenizer.save_pretrained(output)
    model.half().save_pretrained(output)  # type: ignore[no-untyped-call]
    click.echo(f"{output}: loss {loss:.4f}, {settings.steps} steps, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
