"""Embeddings with an MLP, as Li and Liang and all code bases derived from theirs train prefixes.

`wte.weight` [prefix_length, width] goes through `control_trans`, which gives [prefix_length, 2 * layers * heads *
head_dim]. `control_trans` is `Linear`, `Tanh`, `Linear` (`.0`, `.2`), and deep variants have another `Tanh`, `Linear`
(`.4`). Names differ between code bases and may have the name of a module before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import ModelShape
from prefix_runtime import LayerPrefix

from .checkpoint import Checkpoint
from .trained import evaluated, folded
from .untrained import UNTRAINED, is_linear

_DEEPEST = 4


@dataclass(frozen=True)
class PromptTable:
    """The starts of the names of a table of embeddings and of its MLP, and their attention site."""

    embedding: str
    mlp: str
    site: str


def lead(checkpoint: Checkpoint, name: str) -> str | None:
    """The text before a name in the checkpoint, such as `model.`; None if the name does not occur."""
    leads = [each.removesuffix(name) for each in checkpoint.shapes if each == name or each.endswith(f".{name}")]
    return min(leads, key=len) if leads else None


def required_lead(checkpoint: Checkpoint, name: str) -> str:
    """The text before a name that every checkpoint of a family has.

    Raises:
        CheckpointError: the name does not occur; the message lists the first names that do.
    """
    start = lead(checkpoint, name)
    if start is None:
        names = ", ".join(repr(each) for each in list(checkpoint.shapes)[:4]) or "none"
        raise CheckpointError(f"{checkpoint.weights}: expected a tensor {name!r}, found tensors {names}")
    return start


def matrix(checkpoint: Checkpoint, start: str, table: PromptTable) -> np.ndarray:
    """The MLP's outputs for a table, [rows, 2 * layers * heads * head_dim].

    Raises:
        CheckpointError: a tensor is missing or does not fit; the message names it.
    """
    name = f"{start}{table.embedding}.weight"
    if name not in checkpoint.shapes:
        raise CheckpointError(f"{checkpoint.weights}: expected a tensor {name!r} beside {table.mlp!r}, found none")
    return through_mlp(checkpoint, f"{start}{table.mlp}", checkpoint.array(name))


def through_mlp(checkpoint: Checkpoint, stem: str, inputs: np.ndarray, activation: str = "tanh") -> np.ndarray:
    """The outputs of the MLP with this name for inputs [rows, width].

    Raises:
        CheckpointError: the MLP is missing or does not fit; the message names the tensor.
    """
    return evaluated(inputs, _mlp(checkpoint, stem), f"{checkpoint.weights}: {stem}", activation)


def untrained(
    checkpoint: Checkpoint, stems: Iterable[str], framework: str, deviation: float | None = None
) -> list[str]:
    """A warning if all these MLPs look untrained. Embeddings are not tested, because training hardly changes them.

    Args:
        checkpoint: a checkpoint for which `through_mlp` did not raise.
        stems: the names of the MLPs.
        framework: the name of the framework in the warning.
        deviation: see `is_linear`.
    """
    if all(is_linear(_mlp(checkpoint, stem), deviation) for stem in stems):
        return [f"its MLP: {UNTRAINED.format(framework=framework)}"]
    return []


def _mlp(checkpoint: Checkpoint, stem: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of each linear layer."""
    layers = []
    for index in range(0, _DEEPEST + 1, 2):
        names = [f"{stem}.{index}.{part}" for part in ("weight", "bias")]
        present = [name for name in names if name in checkpoint.shapes]
        if len(present) == 1:
            raise CheckpointError(f"{checkpoint.weights}: expected {' and '.join(names)}, found {present[0]} alone")
        if present:
            weight, bias = map(checkpoint.array, names)
            layers.append((weight, bias))
    if not layers:
        raise CheckpointError(f"{checkpoint.weights}: expected an MLP {stem}.0, {stem}.2, found none")
    return layers


def described(checkpoint: Checkpoint, is_shown: Callable[[str], bool]) -> dict[str, str]:
    """The shapes of some of the tensors, by name, for people."""
    return {name: " x ".join(map(str, shape)) for name, shape in checkpoint.shapes.items() if is_shown(name)}


def sites_of(
    checkpoint: Checkpoint, shape: ModelShape, start: str, tables: Iterable[PromptTable]
) -> dict[str, list[LayerPrefix]]:
    """The keys and values of each table's site; see `matrix` and `site_layers`."""
    return {
        table.site: site_layers(checkpoint, shape, table.site, matrix(checkpoint, start, table), table.mlp)
        for table in tables
    }


def site_layers(
    checkpoint: Checkpoint, shape: ModelShape, site: str, numbers: np.ndarray, stem: str
) -> list[LayerPrefix]:
    """The keys and values of a site, from a matrix with slots for the decoder's layers, as these code bases write it.

    An encoder with fewer layers does not use the last slots. An encoder with more layers is an error.
    """
    layers = shape.site(site, str(checkpoint.weights))
    counted = shape.sites.get("decoder", layers)
    pairs = folded(numbers, counted, f"{checkpoint.weights}: {stem}")
    if len(layers) > len(pairs):
        raise CheckpointError(
            f"{checkpoint.weights}: {stem}: expected slots for {len(layers)} layers of the {site}, found {len(pairs)}; "
            "the code that trained it cannot run such a model"
        )
    return list(pairs[: len(layers)])
