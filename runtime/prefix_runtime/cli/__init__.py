"""The command line `prefix-runtime`."""
