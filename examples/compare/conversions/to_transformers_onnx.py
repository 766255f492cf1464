"""A model to the graph of transformers' own exporter, one for prefill and decode, fused for onnxruntime on CPU.

python to_transformers_onnx.py MODEL FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter


def main() -> None:
    """Export."""
    model, folder = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), Path(sys.argv[2])
    ids = torch.arange(8)[None]
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    exported = OnnxExporter().export_for_generation(model, sample, config, multi_token_decode=True)
    folder.mkdir()
    OnnxExporter.save_program(exported.components["decode"].program, folder / "model.onnx")


if __name__ == "__main__":
    main()
