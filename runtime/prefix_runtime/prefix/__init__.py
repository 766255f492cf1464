"""Prefixes: the value, its file, several as one, and the geometry that they must fit."""
