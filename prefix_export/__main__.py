"""`python -m prefix_export`, the command line."""

from .cli import main

main(prog_name="prefix-export")
