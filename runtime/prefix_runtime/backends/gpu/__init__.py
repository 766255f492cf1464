"""A GPU's memory and streams, and what lies there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefix_runtime.backends.options import Cuda
from prefix_runtime.errors import ProviderError

if TYPE_CHECKING:
    from .device import Device


def open_device(options: Cuda) -> Device:
    """The GPU that was chosen.

    Raises:
        ProviderError: there is none, or CUDA's bindings are not installed.
    """
    try:
        from .device import Device
    except ImportError as error:
        raise ProviderError(str(error)) from error
    return Device(options)
