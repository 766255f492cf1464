"""PEFT's `generate` on eager torch: a prefix adapter of each length, or with --lora a LoRA, unmerged.

python peft_eager.py MODEL ADAPTERS THREADS [--lora]
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from peft import PeftModel
from protocol import Generation, serve
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging


class _Clock(BaseStreamer):
    """Notes when each token comes; transformers hands over the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002  # transformers names it
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


class Eager:
    """The bare model, and PEFT's model of each prefix length, which share its weights."""

    def __init__(self, model: Path, adapters: Path) -> None:
        self._adapters = adapters
        bare = AutoModelForCausalLM.from_pretrained(model).eval()
        self._models: dict[int, PreTrainedModel | PeftModel] = {0: bare}

    def generate(self, prefix_length: int, prompt: list[int], new_tokens: int) -> Generation:
        """One `generate`: PEFT's, or for the bare model transformers'."""
        if prefix_length not in self._models:
            adapter = self._adapters / f"p{prefix_length}"
            self._models[prefix_length] = PeftModel.from_pretrained(self._models[0], adapter).eval()
        return generate(self._models[prefix_length], prompt, new_tokens)


class Lora:
    """PEFT's model with a LoRA beside every matrix; it has no prefix."""

    def __init__(self, model: Path, adapters: Path) -> None:
        self._adapter = adapters / "lora"
        bare = AutoModelForCausalLM.from_pretrained(model)
        self._model = PeftModel.from_pretrained(bare, self._adapter, adapter_name="0").eval()

    def generate(self, prefix_length: int, prompt: list[int], new_tokens: int) -> Generation:  # noqa: ARG002
        """One `generate`; `prefix_length` is the protocol's."""
        return generate(self._model, prompt, new_tokens)

    def answer_each(self, tasks: int) -> dict[str, list[float]]:
        """Seconds to switch to each of so many adapters, loaded side by side: its first request, then its second."""
        for index in range(1, tasks):
            self._model.load_adapter(self._adapter, adapter_name=str(index))
        return {"first request": self._switch_to_each(tasks), "later requests": self._switch_to_each(tasks)}

    def _switch_to_each(self, tasks: int) -> list[float]:
        """One short request of every adapter in turn; seconds that switching to it took."""
        found = []
        for index in range(tasks):
            started = time.perf_counter()
            self._model.set_adapter(str(index))
            found.append(time.perf_counter() - started)
            generate(self._model, [1], 2)
        return found


def generate(model: PreTrainedModel | PeftModel, prompt: list[int], new_tokens: int) -> Generation:
    """The model's own greedy `generate`."""
    ids = torch.tensor([prompt])
    clock = _Clock()
    started = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
    times = [started, *clock.times[1:]]
    seconds = [later - earlier for earlier, later in pairwise(times)]
    return Generation(output[0, len(prompt) :].tolist(), seconds)


def main() -> None:
    """Serve what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peer = Lora if arguments.lora else Eager
    serve(lambda: peer(arguments.model, arguments.adapters), "torch", "transformers", "peft")


if __name__ == "__main__":
    main()
