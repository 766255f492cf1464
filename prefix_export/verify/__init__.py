"""The certificate: the graph against the source framework, and what rounding costs."""
