"""onnxruntime-genai on a bundle: `python genai_client.py BUNDLE PROMPTS_JSON`; prints new token ids as JSON."""

import json
import sys

import onnxruntime_genai as og

model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
answers = []
for prompt in json.loads(sys.argv[2]):
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(tokenizer.encode(prompt))
    ids = []
    while not generator.is_done():
        generator.generate_next_token()
        ids.append(int(generator.get_next_tokens()[0]))
    answers.append(ids)
print(json.dumps(answers))
