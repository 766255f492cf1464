"""Changes to a graph, one kind a module."""
