"""The benchmark: measure a bundle, and report the figures."""
