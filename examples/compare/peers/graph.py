"""A graph of other makers on onnxruntime, the prefix as its initial past; past and present stay in onnxruntime's hands.

python graph.py GRAPH PREFIXES THREADS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from prefix_file import read_past
from protocol import Generation, greedy, serve

TEXT_INPUTS = {"input_ids", "attention_mask", "position_ids"}


class Graph:
    """A decoder graph whose pasts and presents come in the same order, each layer's key and then its value."""

    def __init__(self, graph: str, prefixes: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._prefixes = prefixes
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._pasts = [node for node in self._session.get_inputs() if node.name not in TEXT_INPUTS]

    def generate(self, prefix_length: int, prompt: list[int], new_tokens: int) -> Generation:
        """One request."""
        past, position = self._initial_past(prefix_length), prefix_length

        def step(fed: list[int]) -> int:
            nonlocal past, position
            logits, past = self._run(fed, position, past)
            position += len(fed)
            return int(logits[0, -1].argmax())

        return greedy(step, prompt, new_tokens)

    def _initial_past(self, prefix_length: int) -> list[onnxruntime.OrtValue]:
        if prefix_length:
            layers = read_past(self._prefixes / f"p{prefix_length}.safetensors")
            arrays = [array for pair in layers for array in pair]
        else:
            # transformers' exporter gives an axis of fixed size the size as its name.
            shapes = [(1, int(past.shape[1]), 0, int(past.shape[3])) for past in self._pasts]
            arrays = [np.empty(shape, np.float32) for shape in shapes]
        return [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]

    def _run(
        self, fed: list[int], position: int, past: list[onnxruntime.OrtValue]
    ) -> tuple[np.ndarray, list[onnxruntime.OrtValue]]:
        """The logits `[1, sequence, vocab]` float32, and the past of the next step."""
        binding = self._session.io_binding()
        for name, array in self._text_inputs(fed, position).items():
            binding.bind_cpu_input(name, array)
        for node, value in zip(self._pasts, past, strict=True):
            binding.bind_ortvalue_input(node.name, value)
        for node in self._session.get_outputs():
            binding.bind_output(node.name)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return logits.numpy(), present

    def _text_inputs(self, fed: list[int], position: int) -> dict[str, np.ndarray]:
        """Those of the text's inputs that this graph has."""
        total = position + len(fed)
        arrays = {
            "input_ids": np.array([fed], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(position, total, dtype=np.int64)[np.newaxis],
        }
        return {name: array for name, array in arrays.items() if name in self._inputs}


if __name__ == "__main__":
    serve(lambda: Graph(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])), "onnxruntime")
