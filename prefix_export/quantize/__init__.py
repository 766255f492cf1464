"""Weights in 8 or 4 bits, and the scales of keys and values in 8."""
