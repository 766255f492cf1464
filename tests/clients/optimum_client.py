"""optimum's `ORTModelForCausalLM` on a bundle: `python optimum_client.py BUNDLE PROMPTS_JSON NEW_TOKENS`.

Prints new token ids as a JSON object: each prompt alone, greedily and by a beam search; all together, padded left.
"""

import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

bundle, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(bundle)
tokenizer = AutoTokenizer.from_pretrained(bundle, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token


def answer(texts, **options):
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


print(
    json.dumps(
        {
            "greedy": [answer([prompt])[0] for prompt in prompts],
            "beam": [answer([prompt], num_beams=3)[0] for prompt in prompts],
            "batch": answer(prompts),
        }
    )
)
