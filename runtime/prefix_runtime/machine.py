"""What this machine and this process are: processor, memory, versions; None where the system does not tell."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

_PROCESSORS = Path("/proc/cpuinfo")
_MEMORY = Path("/proc/meminfo")
_PROCESS = Path("/proc/self/status")
_DISTRIBUTIONS = ("prefix-runtime", "onnxruntime", "onnxruntime-gpu", "numpy")


def describe(gpu: str | None = None) -> dict[str, str]:
    """Processor, number of processors that this process may use, and system; nothing that tells whose machine it is.

    Args:
        gpu: the name of the one that is used, which stands first.
    """
    description = {} if gpu is None else {"gpu": gpu}
    return description | {
        "processor": processor_name(),
        "processors": f"{usable_processors()} processors",
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor_features() -> str:
    """The processor's name and what instructions it has: code and packed weights for one may not suit another."""
    flags = _line(_PROCESSORS, "flags") or _line(_PROCESSORS, "Features") or ""  # as x86 and ARM call them
    return f"{processor_name()}: {' '.join(sorted(flags.split()))}"


def versions() -> dict[str, str]:
    """Of Python, the runtime and what it runs on, those that are installed."""
    versions_by_name = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions_by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions_by_name


def usable_processors() -> int:
    """Processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS or Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes that can be had without swapping."""
    return _kibibytes(_MEMORY, "MemAvailable")


def resident_memory() -> int | None:
    """Bytes of this process that are in memory now."""
    return _kibibytes(_PROCESS, "VmRSS")


def peak_memory() -> int | None:
    """Bytes of this process that were in memory at once, at the most."""
    # Linux' ru_maxrss begins with what the parent had when it started this process; VmHWM is the process' own.
    peak = _kibibytes(_PROCESS, "VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _kibibytes(path: Path, name: str) -> int | None:
    """Bytes of a line `name: 12 kB`."""
    text = _line(path, name)
    return None if text is None else int(text.split()[0]) * 1024


def processor_name() -> str:
    """The processor's name."""
    return _line(_PROCESSORS, "model name") or platform.processor() or platform.machine()


def _line(path: Path, name: str) -> str | None:
    if not path.exists():
        return None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
