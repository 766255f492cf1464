"""What a model writes greedily after prompts, and how near that comes to the right texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from sacrebleu import corpus_bleu
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 160
"""Beyond the longest right answer."""


class LanguageModel(Protocol):
    """What is used of a model, whether it has a prefix or not."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    def generate(self, **inputs: Tensor | int | bool) -> Tensor:
        """The prompt's and the new token ids, `[batch, sequence]` int64."""


@dataclass(frozen=True)
class Score:
    """How near generated texts came to the right ones."""

    exact_match_percent: float
    bleu: float
    """sacrebleu's corpus BLEU, 0 to 100."""


def continuations(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
) -> list[str]:
    """What `model` writes greedily after each prompt, up to the end-of-text token."""
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    texts = [""] * len(prompts)
    for rows in rows_of_equal_length(prompt_ids, batch_size):
        ids = torch.tensor([prompt_ids[row] for row in rows], device=model.device)  # [rows, prompt]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        decoded = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, decoded, strict=True):
            texts[row] = text
    return texts


def rows_of_equal_length(prompt_ids: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of prompts equally long, so that no batch needs padding."""
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for row, ids in enumerate(prompt_ids):
        by_length[len(ids)].append(row)
    for rows in by_length.values():
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def score(texts: Sequence[str], answers: Sequence[str]) -> Score:
    """The score of `texts` against the right `answers`."""
    exact = sum(text == answer for text, answer in zip(texts, answers, strict=True))
    bleu = corpus_bleu(list(texts), [list(answers)]).score
    return Score(round(100 * exact / len(answers), 1), round(bleu, 1))
