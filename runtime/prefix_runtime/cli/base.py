"""Shared parts of both command lines: errors, paths, colour, and text for any stream's encoding."""

from __future__ import annotations

import codecs
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from prefix_runtime.errors import PrefixRuntimeError
from prefix_runtime.interrupts import ending_when_stopped
from prefix_runtime.text_table import folded

_PLAIN = {"─": "-", "→": "->", "…": "...", "\u00d7": "x", "·": ".", "µ": "u", "±": "+-", "€": "EUR"}
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")
_PLAIN_ERRORS = "prefix_runtime.plain"


class UserPath(click.Path):
    """A path from the user; `~` is the home folder even if no shell expands it, as in `--output=~/bundle`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path with its home folder expanded."""
        return super().convert(expanded(value), param, ctx)


class _HubIdOrPath(click.types.StringParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(expanded(value), param, ctx)


PATH = UserPath()
HUB_ID_OR_PATH = _HubIdOrPath()
STANDARD_OUTPUT = Path("-")
"""The path that stands for standard output."""


class ErrorReportingGroup(click.Group):
    """A group whose commands turn the library's own errors into one line and exit code 1; a bug keeps its traceback."""

    expected_errors: tuple[type[Exception], ...] = (PrefixRuntimeError, OSError, MemoryError)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])  # subcommands inherit it

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn expected errors into click's."""
        ctx.color = wants_color()
        _print_anything()
        with ending_when_stopped():
            try:
                return super().invoke(ctx)
            except BrokenPipeError:
                raise  # click exits quietly if the reader of a pipe has closed it
            except self.expected_errors as error:
                raise click.ClickException(as_line(error)) from error
            except (ImportError, RuntimeError) as error:
                if not (_is_onnxruntime_missing(error) or _is_out_of_memory(error)):
                    raise
                raise click.ClickException(as_line(error)) from error


def as_line(error: Exception) -> str:
    """An error as one line for people."""
    from prefix_runtime.files import without_partial_names
    from prefix_runtime.os_errors import described

    if isinstance(error, OSError):
        text = described(error)
    elif isinstance(error, MemoryError) or _is_out_of_memory(error):
        text = f"out of memory: {error}" if str(error) else "out of memory"
    else:
        text = without_partial_names(str(error))
    return " ".join(text.split())


def _is_onnxruntime_missing(error: Exception) -> bool:
    return isinstance(error, ImportError) and error.name == "onnxruntime"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch could not allocate memory: a RuntimeError on a CPU, a subclass of it on a GPU (2.13)."""
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)


def expanded(path: Any) -> Any:
    """A path with its home folder expanded, unless a file has exactly that name."""
    if isinstance(path, str) and path.startswith("~") and not os.path.lexists(path):
        return os.path.expanduser(path)  # noqa: PTH111  # Path's raises for an unknown user
    return path


def wants_color() -> bool | None:
    """Whether the environment asks for colour and styles; None lets the stream decide: only a terminal has them.

    Source: no-color.org; bixense.com/clicolors. NO_COLOR and FORCE_COLOR count if they are not empty.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("CLICOLOR") == "0" or is_dumb_terminal():
        return False
    return True if os.environ.get("FORCE_COLOR") else None


def is_dumb_terminal() -> bool:
    """Whether the terminal says that it cannot move its cursor."""
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def line_width() -> int | None:
    """The width of the terminal in characters, for wrapping text; None in a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table_width() -> int | None:
    """The width for tables in characters: the terminal's, or COLUMNS even in a pipe; None if neither is known."""
    is_known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return shutil.get_terminal_size().columns if is_known else None


def write_output(path: Path, content: bytes) -> None:
    """Write a file atomically, or to standard output.

    Raises:
        OSError: the disk is full or not writable; an existing file is unchanged.
    """
    from prefix_runtime.files import write_file_atomically

    if path == STANDARD_OUTPUT:
        click.echo(content, nl=False)
    else:
        write_file_atomically(path.resolve(), content)


def print_fields(fields: dict[str, str], as_json: bool) -> None:
    """Print names and values, one per line or as JSON."""
    if as_json:
        click.echo(json.dumps(fields))
        return
    column = max(map(len, fields))
    for name, value in fields.items():
        click.echo(folded(f"{name:<{column}}  {value}", line_width(), indent=column + 2))


def _print_anything() -> None:
    """Replace characters that a stream's encoding lacks by plain ones, instead of failing."""
    codecs.register_error(_PLAIN_ERRORS, _in_plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=_PLAIN_ERRORS)


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each) or ascii(each)[1:-1] for each in lacking), error.end
