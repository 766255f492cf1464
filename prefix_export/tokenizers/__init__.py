"""A model's tokenizer: write it, compare it with the runtime's; and texts for checks."""
