"""The benchmark: what is measured, measuring it, and its figures."""
