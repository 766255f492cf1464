"""Do something once for each point at which files may fail, and tell what is left; run it with `faulty_files.c`.

    python file_faults.py OPERATION FOLDER SOURCE...

Prints a JSON object: for each way to fail how many points there were, how many attempts left the old state and the new
one, and what was left that is neither.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

from prefix_runtime import Bundle, Prefix, PrefixRuntimeError
from prefix_runtime.backends.onnxruntime.packed_graphs import _is_intact, pack_graph, packed_graph

WAYS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES, "kill": 0}
_DONE, _REFUSED, _BUG = 0, 3, 4
_NOWHERE = 10**9

_layer = ctypes.CDLL(None)


class InChildError(BaseException):
    """Raised in a child that is to go on from where it was forked."""


class FinishedError(BaseException):
    """All points were tried."""


class Child:
    """A forked process in which the file system fails at a point of a folder; in it, `ends` is to be called."""

    def __init__(self, folder, point, way):
        self.point = point
        self._reader, self._writer = os.pipe()
        self.number = os.fork()
        if self.is_here:
            _layer.fault_arm(str(folder).encode(), ctypes.c_long(point), WAYS[way])

    @property
    def is_here(self):
        return self.number == 0

    def ends(self, status):
        """End this process, and tell whether the point was reached."""
        os.write(self._writer, b"missed" if _layer.fault_count() < self.point else b"")
        os._exit(status)

    def wait(self):
        """Exit status, negative for a signal, and whether the point was reached."""
        os.close(self._writer)
        was_missed = bool(os.read(self._reader, 10))
        os.close(self._reader)
        return os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1]), not was_missed


def outcome(work):
    """Do something; returns the exit status of that."""
    try:
        work()
    except (FinishedError, InChildError):
        raise
    except (OSError, PrefixRuntimeError):
        return _REFUSED
    except BaseException as error:  # noqa: BLE001  # to be told, not to be handled
        if type(error).__module__ == "prefix_export.errors":
            return _REFUSED
        traceback.print_exc()
        return _BUG
    return _DONE


def attempt(work, folder, point, way):
    """Do something in a child; see `Child.wait`."""
    child = Child(folder, point, way)
    if child.is_here:
        child.ends(outcome(work))
    return child.wait()


def at_each_point(try_once, begin, state):
    """Fail at each point in turn; `state` says what is left: "old", "new", or what is wrong."""
    told = {}
    for way in WAYS:
        counted, wrong, point, was_reached = Counter(), [], 0, True
        while was_reached:
            point += 1
            begin()
            status, was_reached = try_once(point, way)
            left = state(is_killed=status == -signal.SIGKILL)
            counted[left if left in ("old", "new") else "wrong"] += 1
            if left not in ("old", "new") or status not in (_DONE, _REFUSED, -signal.SIGKILL):
                wrong.append(f"point {point}: status {status}, {left}")
        told[way] = {"points": point - 1, **counted, "what": wrong}
    return told


def partials(folder):
    return [str(path.relative_to(folder)) for path in folder.rglob(".*.partial")]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_tasks(operation, folder, bundle, prefix_file):
    """`tasks add` or `tasks remove`."""
    place, prefix = folder / "bundle", Prefix.load(prefix_file)

    def begin():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(bundle, place)

    def work():
        opened = Bundle.open(place)
        opened.add_task("new", prefix) if operation == "add" else opened.remove_task("p3")

    begin()
    old = content(place)
    work()
    new = content(place)

    def state(*, is_killed):
        left = Bundle.open(place)
        left.verify()
        found = content(place)
        # What a killed process leaves, or a file that could not be removed, no manifest names.
        if is_killed or operation == "remove":
            named = {entry.path for entry in left.entries()} | {"manifest.json"}
            found = {name: text for name, text in found.items() if name in named}
        if found == old:
            return "old"
        # safetensors writes metadata in any order, so the same prefix is not the same bytes each time.
        is_new = found.keys() == new.keys() and (operation == "remove" or left.prefix("new") == prefix)
        return "new" if is_new else f"other files: {sorted(found.keys() ^ old.keys())}"

    return at_each_point(lambda point, way: attempt(work, folder, point, way), begin, state)


def keep(folder, bundle):
    """`prepare`."""
    os.environ["PREFIX_RUNTIME_CACHE"] = str(folder / "cache")
    opened = Bundle.open(bundle)

    def begin():
        shutil.rmtree(folder / "cache", ignore_errors=True)

    def state(*, is_killed):
        graph = packed_graph(opened)
        if graph is not None and not _is_intact(graph.parent):
            return "a graph that is not whole"
        if (left := partials(folder)) and not is_killed:
            return f"left behind: {left}"
        # However it ended, the next attempt succeeds.
        if attempt(lambda: pack_graph(opened), folder, _NOWHERE, "EIO")[0] != _DONE or packed_graph(opened) is None:
            return "it cannot be kept any more"
        return "old" if graph is None else "new"

    return at_each_point(lambda point, way: attempt(lambda: pack_graph(opened), folder, point, way), begin, state)


def build_bundle(folder, model, adapter):
    """`build`, from the moment on when the traced graph is to be written; tracing writes nothing and takes seconds."""
    from prefix_export.build import BuildRequest, build
    from prefix_export.graph import export as graph

    output, save, told, children = folder / "out", graph.ir.save, {}, []

    def state(*, is_killed):
        if output.exists():
            Bundle.open(output).verify()
            return "new"
        return f"left behind: {left}" if (left := partials(folder)) and not is_killed else "old"

    def save_in_children(traced, path, **options):
        def begin():
            for left in (output, *folder.glob(".*.partial")):
                shutil.rmtree(left, ignore_errors=True)
            path.parent.mkdir()

        def go_on(point, way):
            children.append(Child(folder, point, way))
            if children[-1].is_here:
                raise InChildError
            return children[-1].wait()

        try:
            told.update(at_each_point(go_on, begin, state))
        except InChildError:
            return save(traced, path, **options)
        raise FinishedError

    graph.ir.save = save_in_children
    request = BuildRequest(str(model), {"task": Path(adapter)}, output, verify=False)
    try:
        status = outcome(lambda: build(request))
    except FinishedError:
        return told
    children[-1].ends(status)
    return None


OPERATIONS = {
    "add": lambda *arguments: change_tasks("add", *arguments),
    "remove": lambda *arguments: change_tasks("remove", *arguments),
    "prepare": keep,
    "build": build_bundle,
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(OPERATIONS[sys.argv[1]](*map(Path, sys.argv[2:]))))
