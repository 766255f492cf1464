"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefix_runtime.errors import BundleError
from prefix_runtime.files import blaming, partial_name, sync_folder, sync_tree


def check_output(output: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        BundleError: the output exists, or its parent folder does not or cannot be written to.
    """
    if output.exists() or output.is_symlink():
        raise BundleError(f"{output}: expected nothing there yet; remove it or choose another --output")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise BundleError(f"{parent}: expected a folder to write into, found none")
    if not os.access(parent, os.W_OK):
        raise BundleError(
            f"{parent}: expected a folder that this user can write into, found one that is read-only; choose another "
            "--output"
        )


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A fresh sibling folder that becomes `output` when the block ends well, and is removed when it does not.

    Raises:
        BundleError: the output exists, or the folder that it is to stand in does not.
    """
    check_output(output)
    staging = partial_name(output.absolute())
    try:
        with blaming(output, staging):
            staging.mkdir()
            yield staging
            sync_tree(staging)
            check_output(output)
            staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(output.absolute().parent)
