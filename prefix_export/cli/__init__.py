"""The command line `prefix-export`."""
