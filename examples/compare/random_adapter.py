"""Random prefixes that PEFT saved: speed and parity do not depend on what they hold."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import PreTrainedModel


def save_random_adapter(model: PreTrainedModel, length: int, folder: Path, seed: int = 0) -> None:
    """A PEFT adapter folder with a random prefix of this length."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    wrapped.save_pretrained(folder)
