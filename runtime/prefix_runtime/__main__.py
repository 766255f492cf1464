"""`prefix-runtime` and `python -m prefix_runtime`: the command line.

It imports little at first, so that Ctrl-C is handled from the start.
"""

from __future__ import annotations

from .interrupts import exit_at_once


def main() -> None:
    """Run the command line."""
    exit_at_once()
    from .cli.main import main as command

    command(prog_name="prefix-runtime")


if __name__ == "__main__":
    main()
