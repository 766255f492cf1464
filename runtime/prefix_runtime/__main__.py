"""`python -m prefix_runtime`, the command line."""

from .cli import main

main(prog_name="prefix-runtime")
