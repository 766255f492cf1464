"""Check names of models and checkpoints: a path or a Hub id, without the network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from prefix_export.errors import CheckpointError, ModelError

_HUB_MODEL = re.compile(
    r"(?=[^@]{1,96}(?:@|$))(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*(?:(?:/[\w.-]+)+\.gguf)?(?:@\S+)?", re.ASCII
)
_HUB_CHECKPOINT = re.compile(r"(?=[^@]{1,96}(?:@|$))[A-Za-z0-9][\w.-]*(?:/[\w.-]+)+(?:@\S+)?", re.ASCII)


def check_model(name: str) -> None:
    """Refuse a base model whose name can only be a path, if there is no model at that path.

    Raises:
        ModelError: the folder or file does not exist or holds no model, and the name is not a Hub id.
    """
    path = Path(name)
    if _is_dir(path):
        has_config = os.path.exists(path / "config.json")  # noqa: PTH110  # Path's raises if a name is too long
        if not has_config and not any(path.glob("*.gguf")):
            raise ModelError(
                f"model {name!r}: expected a Hub id or a folder with a config.json, found a folder without"
                f"{_adapter_advice(path)}"
            )
    elif not os.path.exists(name) and not _HUB_MODEL.fullmatch(name):  # noqa: PTH110
        raise ModelError(f"model {name!r}: expected a Hub id or a folder with a config.json, found no such folder")


def check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint whose name can only be a path, if there is nothing at that path.

    Raises:
        CheckpointError: the folder or file does not exist, and the name is not a Hub id.
    """
    if not os.path.exists(path) and not _HUB_CHECKPOINT.fullmatch(str(path)):  # noqa: PTH110
        raise CheckpointError(f"{path}: expected a trained prefix, a file or a folder, found nothing there")


def _is_dir(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path's raises if a name is too long


def _adapter_advice(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "; it holds an adapter: name it with --prefix, and its base model with --model"
    return ""
