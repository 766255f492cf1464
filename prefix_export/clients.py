"""Files for other programs that run the graph: adapter files and configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefix_runtime import Prefix
from prefix_runtime.backends.onnxruntime.adapter_files import save_adapter
from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.bundle.folder import adapter_path
from prefix_runtime.prefix.prefix import DECODER

from .models import BaseModel
from .tokenizers.tokenizer import save_tokenizer

GENAI_CONFIG_NAME = "genai_config.json"


def save_adapters(prefixes: Mapping[str, Prefix], folder: Path, dtype: np.dtype) -> None:
    """Write `adapters/TASK.onnx_adapter` for each task, with the graph's prefix inputs by name.

    A program in any language that onnxruntime supports can then select a task with `RunOptions.add_active_adapter`.

    Args:
        prefixes: the prefixes by task.
        folder: the bundle's folder; `adapters` must not exist in it.
        dtype: the type of the graph's prefix inputs.

    Raises:
        OSError: the disk is full or not writable.
    """
    (folder / "adapters").mkdir()
    for task, prefix in prefixes.items():
        tensors: dict[str, np.ndarray] = {contract.POSITION_BASE: np.array([prefix.position_base], np.int64)}
        for index, layer in enumerate(prefix.sites[DECODER]):
            for part, array in zip(contract.PARTS, (layer.key, layer.value), strict=True):
                tensors[contract.tensor_name(contract.PREFIX, index, part)] = np.ascontiguousarray(array[None], dtype)
        save_adapter(folder / adapter_path(task), tensors)


def genai_config(base: BaseModel, graph: str, room: int) -> dict[str, Any]:
    """The configuration for onnxruntime-genai (0.18) to run a graph that holds one prefix.

    The type "llama" fits any decoder with the contract's names. The type "gpt2" would mean another layout of the past.

    Args:
        base: the model.
        graph: the graph's path, relative to the configuration.
        room: the number of tokens of prompt and new text that fit.
    """
    first = base.layers[0]
    generation = base.generation_config
    end = generation.eos_token_id
    ends = end if isinstance(end, list) else [] if end is None else [end]
    padding = generation.pad_token_id if generation.pad_token_id is not None else (ends or [0])[0]
    return {
        "model": {
            # genai requires these tokens even if the model has none.
            "bos_token_id": generation.bos_token_id if generation.bos_token_id is not None else padding,
            "eos_token_id": ends or [base.geometry.vocab_size],
            "pad_token_id": padding,
            "context_length": room,
            "vocab_size": base.geometry.vocab_size,
            "type": "llama",
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph,
                "head_size": first.head_dim,
                "hidden_size": first.heads * first.head_dim,
                "num_attention_heads": first.heads,
                "num_key_value_heads": first.key_value_heads,
                "num_hidden_layers": len(base.layers),
                "inputs": {
                    "input_ids": contract.INPUT_IDS,
                    "attention_mask": contract.ATTENTION_MASK,
                    "position_ids": contract.POSITION_IDS,
                    "past_key_names": contract.tensor_name(contract.PAST, "%d", "key"),
                    "past_value_names": contract.tensor_name(contract.PAST, "%d", "value"),
                },
                "outputs": {
                    "logits": contract.LOGITS,
                    "present_key_names": contract.tensor_name(contract.PRESENT, "%d", "key"),
                    "present_value_names": contract.tensor_name(contract.PRESENT, "%d", "value"),
                },
            },
        },
        "search": {
            "max_length": room,
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": False,  # in this flavour, past and present are separate buffers
        },
    }


def save_configs(base: BaseModel, folder: Path) -> None:
    """Write a model's configuration, generation defaults and tokenizer in Hugging Face's files.

    Raises:
        ExportError: transformers cannot write the tokenizer.
        OSError: the disk is full or not writable.
    """
    base.model.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    if base.tokenizer is not None:
        save_tokenizer(base.tokenizer, folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
