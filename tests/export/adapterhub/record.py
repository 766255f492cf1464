"""Records what AdapterHub's `adapters` itself computes, for `test_formats_adapterhub.py` to compare with.

    python -m venv hub && hub/bin/pip install torch==2.13.0 adapters==1.3.0
    hub/bin/python tests/export/adapterhub/record.py

It pins an older transformers than this project: it has an environment of its own, and what it says is kept. For each
architecture a tiny random model, adapters with a bottleneck, flat and with layers left out, the keys and values of each
location, and the model's answer to some tokens under them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import adapters
import torch
import transformers
from adapters import PrefixTuningConfig
from safetensors.torch import save_file

HERE = Path(__file__).parent
TASK = "task"
LENGTH = 3
COMMON = {"vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS = {
    "gpt2": (
        transformers.AutoModelForCausalLM,
        transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=24, **COMMON),
    ),
    "bert": (
        transformers.AutoModel,
        transformers.BertConfig(
            hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8,
            max_position_embeddings=24, **COMMON,
        ),
    ),
    "bart": (
        transformers.AutoModelForSeq2SeqLM,
        transformers.BartConfig(
            d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=24, **COMMON,
        ),
    ),
    "t5": (
        transformers.AutoModelForSeq2SeqLM,
        transformers.T5Config(
            d_model=16, d_kv=8, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0, **COMMON
        ),
    ),
    "llama": (
        transformers.AutoModelForCausalLM,
        transformers.LlamaConfig(
            hidden_size=16, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=8,
            max_position_embeddings=24, **COMMON,
        ),
    ),
}  # fmt: skip
KINDS = {
    "bottleneck": {"bottleneck_size": 4},
    "relu": {"bottleneck_size": 4, "non_linearity": "relu"},
    "flat": {"flat": True},
    "leave_out": {"bottleneck_size": 4, "leave_out": [1, 2]},
}


def record(name: str) -> None:
    """Write a model's folder: its weights, its adapters, and what the library says under each."""
    loader, config = MODELS[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = loader.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    adapters.init(model)
    ids = torch.tensor([[5, 9, 3, 17, 11]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 7, 8, 4]])
    for kind, options in KINDS.items():
        model.add_adapter(TASK, config=PrefixTuningConfig(prefix_length=LENGTH, **options))
        for key, parameter in model.named_parameters():
            if "prefix_tunings" in key:
                torch.nn.init.normal_(parameter, std=0.6)
        model.set_active_adapters(TASK)
        model.eval()
        with torch.no_grad():
            output = model(**inputs)
        found = {"answer": output.logits if hasattr(output, "logits") else output.last_hidden_state, **inputs}
        pool = next(module for module in model.modules() if hasattr(module, "prefix_tunings"))
        for location, module in pool.prefix_tunings[TASK].items():
            for index, pair in enumerate(module(1)):
                found |= {f"{location}.{index}.key": pair[0][0], f"{location}.{index}.value": pair[1][0]}
        model.save_adapter(str(folder / kind), TASK, with_head=False)
        save_file({key: tensor.detach().contiguous() for key, tensor in found.items()}, folder / f"{kind}.safetensors")
        model.delete_adapter(TASK)


for each in MODELS:
    record(each)
versions = f"adapters {adapters.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
sys.stdout.write(f"{versions}\n")
