"""Models of real geometry with random weights, and random adapters that PEFT saved for them.

Speed and parity do not depend on what the weights are; nothing has to be downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

CONFIGS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "llama-1b": LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    "tiny": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=320, vocab_size=384, bos_token_id=0, eos_token_id=0),
    "tiny-llama": LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=384,
        max_position_embeddings=320,
        tie_word_embeddings=True,
    ),
}
LORA_RANK = 8
LORA_LAYERS = {
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def save_random_model(name: str, folder: Path) -> None:
    """A model folder with random weights, the same every time, and no end token, so that lengths are as asked for."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    _randomise(model)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder)


def _randomise(model: PreTrainedModel) -> None:
    """Weights unlike a new model's, whose every answer is the last token again and whose zeros optimizers drop."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.02)
        elif all(parameter is not embedding for embedding in embeddings):
            torch.nn.init.normal_(parameter, std=2 * max(parameter.shape) ** -0.5)


def save_random_adapter(model: PreTrainedModel, length: int, folder: Path, seed: int = 0) -> None:
    """A PEFT adapter folder with a random prefix of this length."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    wrapped.save_pretrained(folder)


def save_lora(model: PreTrainedModel, folder: Path) -> None:
    """A PEFT adapter folder with a LoRA on attention and MLP, at its start: it costs its time and changes no token."""
    layers = LORA_LAYERS[model.config.model_type]
    config = LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, target_modules=layers)
    get_peft_model(model, config).save_pretrained(folder)
