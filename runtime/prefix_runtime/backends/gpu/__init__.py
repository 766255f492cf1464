"""A GPU's memory and streams, and prefixes that lie there."""
