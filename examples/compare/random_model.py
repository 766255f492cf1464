"""Models of real geometry with random weights, and random prefixes that PEFT saved for them.

Speed and parity do not depend on what the weights are; nothing has to be downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

CONFIGS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
}


def save_random_model(name: str, folder: Path) -> None:
    """A model folder with random weights, the same every time, and no end token, so that lengths are as asked for."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder)


def save_random_adapter(model: PreTrainedModel, length: int, folder: Path, seed: int = 0) -> None:
    """A PEFT adapter folder with a random prefix of this length."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    wrapped.save_pretrained(folder)
