"""A model's tokenizer: written, compared with the runtime's, one beside an adapter; and texts for checks."""
