"""A device in the host's memory, with the verbs of `gpu.device`: what runs on a GPU runs here, at once."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter

import numpy as np

from prefix_runtime import Cuda


class HostEvent:
    def __init__(self):
        self.wait = lambda: None


class HostMemory:
    def __init__(self, nbytes):
        self.nbytes = nbytes
        # Garbage, as fresh memory of a GPU is: nothing may be read before it was written.
        self._bytes = np.full(max(nbytes, 1), 0x7B, np.uint8)
        self.address = self._bytes.ctypes.data


class HostStream:
    handle = 0

    def __init__(self):
        self.copied = Counter()  # bytes, by verb

    def upload(self, address, array):
        self._copy("upload", address, array.ctypes.data, array.nbytes)

    def download(self, array, address):
        self._copy("download", array.ctypes.data, address, array.nbytes)

    def copy(self, target, source, nbytes):
        self._copy("copy", target, source, nbytes)

    def copy_blocks(self, target, source, width, height, depth):
        for group in range(depth):
            for piece in range(height):
                to, origin = (each.address + (group * each.height + piece) * each.pitch for each in (target, source))
                self._copy("copy", to, origin, width)

    def record(self, event):
        pass

    def synchronize(self):
        pass

    def _copy(self, verb, target, source, nbytes):
        ctypes.memmove(target, source, nbytes)
        self.copied[verb] += nbytes


class LateStream(HostStream):
    """What is uploaded is copied when something waits for it, as late as a GPU may copy it."""

    def __init__(self):
        super().__init__()
        self._asked = []

    def upload(self, address, array):
        self._asked.append((address, array))

    def record(self, event):
        event.wait = self.synchronize

    def synchronize(self):
        for address, array in self._asked:
            super().upload(address, array)
        self._asked.clear()


class HostDevice:
    kind, index, name = "cpu", 0, "a GPU of the host's memory"

    def __init__(self, options=None):
        self.options = options or Cuda()
        self.stream, self.uploads = HostStream(), LateStream()
        self._lock = threading.RLock()
        self._taken = []  # what was let go of may be written late

    def turn(self):
        return self._lock

    def allocate(self, nbytes, stream=None):  # noqa: ARG002
        self._taken.append(HostMemory(nbytes))
        return self._taken[-1]

    def pinned(self, shape, dtype):
        return np.full(shape, 77, dtype)

    def await_uploads(self):
        self.uploads.synchronize()

    def new_event(self):
        return HostEvent()
