"""Checkpoints to prefixes: folded, composed, and looked at for what silently goes wrong."""
