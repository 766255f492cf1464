"""GPT-2 or Llama weights to one GGUF file, every matrix in the same type; vectors and positions stay float32.

    python to_gguf.py MODEL FILE Q8_0|Q4_0|F32

Source: the names and the order of rotary rows of llama.cpp's convert_hf_to_gguf.py. The token embedding is the output's
matrix too, as in the models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import load_file

Tensors = Iterator[tuple[str, np.ndarray]]

GPT2_NAMES = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
LLAMA_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def describe_gpt2(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """GPT-2's geometry."""
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def describe_llama(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Llama's geometry."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])


def gpt2_tensors(weights: dict[str, np.ndarray], config: dict[str, Any]) -> Tensors:
    """GGUF's names, and matrices `[out, in]`."""
    yield "token_embd.weight", weights["transformer.wte.weight"]
    yield "position_embd.weight", weights["transformer.wpe.weight"]
    for kind in ("weight", "bias"):
        yield f"output_norm.{kind}", weights[f"transformer.ln_f.{kind}"]
        for layer in range(config["n_layer"]):
            for theirs, ours in GPT2_NAMES.items():
                # transformers keeps GPT-2's matrices [in, out]
                yield f"blk.{layer}.{ours}.{kind}", weights[f"transformer.h.{layer}.{theirs}.{kind}"].T


def llama_tensors(weights: dict[str, np.ndarray], config: dict[str, Any]) -> Tensors:
    """GGUF's names, and matrices `[out, in]`, the rows of rotary heads in llama.cpp's order."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in LLAMA_NAMES.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            yield f"blk.{layer}.{ours}.weight", _pair_rotary_rows(weight, heads[ours]) if ours in heads else weight


def _pair_rotary_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[heads * head_dim]` with each rotated pair side by side; transformers keeps their halves apart."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(writer: GGUFWriter, tensors: Tensors, kind: GGMLQuantizationType) -> None:
    """Everything but the description."""
    for name, tensor in tensors:
        array = np.ascontiguousarray(tensor, np.float32)
        if array.ndim == 2 and name != "position_embd.weight":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Convert."""
    model, output, kind = Path(sys.argv[1]), sys.argv[2], GGMLQuantizationType[sys.argv[3]]
    config = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    architecture = config["model_type"]
    describe, tensors = {"gpt2": (describe_gpt2, gpt2_tensors), "llama": (describe_llama, llama_tensors)}[architecture]
    writer = GGUFWriter(output, architecture)
    describe(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")  # token ids in, token ids out
    write(writer, tensors(weights, config), kind)


if __name__ == "__main__":
    main()
