"""llama.cpp through llama-cpp-python's low-level interface; a text prompt in its cache stands in for the prefix.

python llamacpp.py FILE THREADS CONTEXT [--float32-cache]
"""

from __future__ import annotations

import argparse
from typing import Any

import llama_cpp
import numpy as np
from protocol import Generation, greedy, serve, stand_in

GGML_TYPE_F32 = 0


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: Any) -> None:
    """Takes llama.cpp's log, which is long."""


class LlamaCpp:
    """A GGUF file in a context of its own."""

    def __init__(self, file: str, threads: int, context: int, float32_cache: bool) -> None:
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        parameters.n_threads = parameters.n_threads_batch = threads
        if float32_cache:
            parameters.type_k = parameters.type_v = GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def generate(self, prefix_length: int, prompt: list[int], new_tokens: int) -> Generation:
        """One request; the stand-in is read before the clock starts."""
        llama_cpp.llama_memory_clear(self._memory, True)
        if prefix_length:
            self._decode(stand_in(prefix_length), 0)
        position = prefix_length

        def step(fed: list[int]) -> int:
            nonlocal position
            token = self._decode(fed, position)
            position += len(fed)
            return token

        return greedy(step, prompt, new_tokens)

    def _decode(self, fed: list[int], position: int) -> int:
        """The likeliest token after these."""
        batch = llama_cpp.llama_batch_init(len(fed), 0, 1)
        batch.n_tokens = len(fed)
        for index, token in enumerate(fed):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == len(fed) - 1
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode: expected 0, found {status}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def main() -> None:
    """Serve what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("threads", type=int)
    parser.add_argument("context", type=int)
    parser.add_argument("--float32-cache", action="store_true")
    arguments = parser.parse_args()
    serve(lambda: LlamaCpp(**vars(arguments)), "llama_cpp_python")


if __name__ == "__main__":
    main()
