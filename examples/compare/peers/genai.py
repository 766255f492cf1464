"""onnxruntime-genai; a text prompt that is in its cache already stands in for the prefix.

python genai.py FOLDER THREADS
"""

from __future__ import annotations

import json
import sys

import onnxruntime_genai
from protocol import Generation, greedy, serve, stand_in


class GenAI:
    """A folder with a graph and its genai_config.json."""

    def __init__(self, folder: str, threads: int) -> None:
        config = onnxruntime_genai.Config(folder)
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(options))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prefix_length: int, prompt: list[int], new_tokens: int) -> Generation:
        """One request; its generator is made and the stand-in is read before the clock starts."""
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        length = prefix_length + len(prompt) + new_tokens
        # Before its least length the end token, which genai insists on, cannot come.
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(self._model, parameters)
        if prefix_length:
            generator.append_tokens(stand_in(prefix_length))
        unread = True

        def step(fed: list[int]) -> int:
            nonlocal unread
            if unread:
                generator.append_tokens(fed)
                unread = False
            generator.generate_next_token()
            return int(generator.get_next_tokens()[0])

        return greedy(step, prompt, new_tokens)


if __name__ == "__main__":
    serve(lambda: GenAI(sys.argv[1], int(sys.argv[2])), "onnxruntime-genai", "onnxruntime")
