"""What runs a graph: a folder each, found through `registry`."""
