"""What onnxruntime-genai wants beside a model or a graph.

python genai_folder.py builder MODEL FOLDER     # the model, with what its model builder asks for
python genai_folder.py graph MODEL GRAPH FOLDER # a graph with the field's names, and a genai_config.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def link(source: Path, folder: Path) -> None:
    """Every file of a folder, by a link; weights are big."""
    folder.mkdir()
    for file in source.resolve().iterdir():
        (folder / file.name).symlink_to(file)


def prepare_builder(model: Path, folder: Path) -> None:
    """The model with a tokenizer and an end token; its builder insists on both."""
    link(model, folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | ENDS))
    tokenizer = Tokenizer(WordLevel({"x": 0}, unk_token="x"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="x").save_pretrained(folder)


def prepare_graph(model: Path, graph: Path, folder: Path) -> None:
    """The graph and its genai_config.json; type `llama` is any decoder with a key and a value for each layer."""
    link(graph.parent, folder)
    content = {"model": _describe(AutoConfig.from_pretrained(model)), "search": {"past_present_share_buffer": False}}
    (folder / "genai_config.json").write_text(json.dumps(content, indent=2))


def _describe(config: Any) -> dict[str, Any]:
    heads = config.num_attention_heads
    decoder = {
        "filename": "model.onnx",
        "hidden_size": config.hidden_size,
        "head_size": config.hidden_size // heads,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", heads),
        "num_hidden_layers": config.num_hidden_layers,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")},
        "outputs": {"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")},
    }
    context = config.max_position_embeddings
    return {"type": "llama", "vocab_size": config.vocab_size, "context_length": context, "decoder": decoder, **ENDS}


if __name__ == "__main__":
    prepare = {"builder": prepare_builder, "graph": prepare_graph}[sys.argv[1]]
    prepare(*map(Path, sys.argv[2:]))
