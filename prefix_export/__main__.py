"""`prefix-export` and `python -m prefix_export`: the command line.

It imports little at first, so that Ctrl-C is handled from the start.
"""

from __future__ import annotations

from prefix_runtime.interrupts import exit_at_once


def main() -> None:
    """Run the command line."""
    exit_at_once()
    from .cli.main import main as command

    command(prog_name="prefix-export")


if __name__ == "__main__":
    main()
