"""Runs commands, each in a fork of a process that has imported what they need: most of a short command is imports.

A line of standard input is a request in JSON: `folder`, `argv` (`prefix-export` or `prefix-runtime` with its
arguments, or `python` with a program's text) and `output`, a file. A line of standard output is the exit code.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module

from prefix_export.__main__ import main as prefix_export_main
from prefix_runtime.__main__ import main as prefix_runtime_main

IMPORTED = ("onnxruntime", "peft", "torch.onnx", "transformers", "prefix_export.build.recipe", "prefix_export.cli.main")


def run(argv):
    """The exit code of a command, in this process."""
    try:
        if argv[0] == "python":
            exec(compile(argv[1], "<page>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = argv
            {"prefix-export": prefix_export_main, "prefix-runtime": prefix_runtime_main}[argv[0]]()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 (whatever it is, the test shows it)
        traceback.print_exc()
        return 70
    return 0


def main():
    for name in IMPORTED:
        import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(request["folder"])
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for old, new in ((nothing, 0), (output, 1), (output, 2)):
                os.dup2(old, new)
            code = run(request["argv"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
