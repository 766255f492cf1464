"""Beam search: several texts of one request side by side, as transformers' `generate` searches them."""
