"""From text to an answer: a request's options, the tokenizer, sampling, what ends an answer, the decoding loop."""
