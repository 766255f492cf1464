"""PEFT's adapters."""
