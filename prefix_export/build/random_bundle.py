"""Bundles of real geometry with random weights and random prefixes, to measure before anything is trained."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from prefix_export.models import BaseModel
from prefix_export.models.random_model import random_base_model
from prefix_export.progress import SILENT, Progress
from prefix_runtime.prefix.random_prefix import random_prefix

from .recipe import BuildRequest, BuildResult, build


def build_random(
    request: BuildRequest, prefixes: int = 0, prefix_length: int = 0, progress: Progress = SILENT
) -> BuildResult:
    """Build a bundle of a model with random weights, which is not compared with anything.

    For a GPU the weights are made in float16: memory is what they take, and once more while the graph is written.

    Args:
        request: its model is one that `random_model.random_config` knows; its prefixes are left out.
        prefixes: how many tasks the bundle gets, `t0`, `t1` and so on.
        prefix_length: of each.
        progress: told how far it is.

    Raises:
        PrefixExportError, PrefixRuntimeError, OSError: as `build` does.
    """
    dtype = torch.float16 if request.target == "cuda" else torch.float32
    with tempfile.TemporaryDirectory(prefix="prefix-export-random-") as folder:
        paths = {f"t{index}": Path(folder) / f"t{index}.safetensors" for index in range(prefixes)}

        def load(name: str) -> BaseModel:
            base = random_base_model(name, dtype)
            for seed, path in enumerate(paths.values()):
                random_prefix(base.geometry, prefix_length, seed).save(path)
            return base

        return build(replace(request, prefixes=paths, verify=False), progress, load)
