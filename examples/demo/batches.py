"""Documents as tensors: tokenized once, kept on the device, drawn as shuffled batches at a falling learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from corpus import Document
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position without loss, as transformers has it."""


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents as token ids, each ended by the tokenizer's end token and padded on the right."""

    token_ids: Tensor
    """`[documents, longest]` int64."""
    prompt_lengths: Tensor
    """`[documents]` int64, in tokens."""
    lengths: Tensor
    """`[documents]` int64, in tokens, end token included."""

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """The longest document's length in tokens."""
        return self.token_ids.shape[1]

    def labels(self, rows: Tensor) -> Tensor:
        """Targets `[rows, longest]` int64: the continuation's token ids, elsewhere `IGNORED`.

        A table is random, so there is nothing to learn from predicting one.
        """
        columns = torch.arange(self.longest, device=rows.device)
        wanted = (columns >= self.prompt_lengths[rows, None]) & (columns < self.lengths[rows, None])
        return self.token_ids[rows].masked_fill(~wanted, IGNORED)


def tokenize(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> TokenizedDocuments:
    """The documents on `device`.

    Raises:
        ValueError: if a prompt alone has other tokens than the same prompt within its document, in
            which case a model trained on documents would be asked something it has not seen.
    """
    whole = tokenizer([d.prompt + d.continuation + tokenizer.eos_token for d in documents])["input_ids"]
    prompts = tokenizer([d.prompt for d in documents])["input_ids"]
    for document, ids, prompt_ids in zip(documents, whole, prompts, strict=True):
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(f"a token crosses from the prompt into the continuation: {document}")
    rows = [torch.tensor(ids) for ids in whole]
    return TokenizedDocuments(
        token_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device),
        prompt_lengths=torch.tensor([len(ids) for ids in prompts], device=device),
        lengths=torch.tensor([len(ids) for ids in whole], device=device),
    )


def shuffled_rows(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of row numbers, `[batch_size]` int64 on the CPU.

    Each epoch takes every row once, in a new order, and drops what does not fill a last batch.
    """
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def learning_rate(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate's factor: a linear warm-up, then half a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
