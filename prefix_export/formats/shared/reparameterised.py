"""Embeddings behind an MLP, as Li and Liang train prefixes and as those do who took their code.

`wte.weight` [prefix_length, width] goes through `control_trans`: `Linear`, `Tanh`, `Linear`, and once more where it is
deep (`.0`, `.2`, `.4`), to [prefix_length, 2 * layers * heads * head_dim]. Names differ from one code base to the next,
and stand behind whatever module holds them.
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
    """A table of embeddings and the MLP behind it, by their names' beginnings, and the site that they are for."""

    embedding: str
    mlp: str
    site: str


def lead(checkpoint: Checkpoint, name: str) -> str | None:
    """What stands before a name in the checkpoint, such as `model.`; None where the name does not occur."""
    leads = [each.removesuffix(name) for each in checkpoint.shapes if each == name or each.endswith(f".{name}")]
    return min(leads, key=len) if leads else None


def required_lead(checkpoint: Checkpoint, name: str) -> str:
    """What stands before a name that a family's checkpoints have.

    Raises:
        CheckpointError: the name does not occur.
    """
    start = lead(checkpoint, name)
    if start is None:
        there = ", ".join(repr(each) for each in list(checkpoint.shapes)[:4]) or "none"
        raise CheckpointError(f"{checkpoint.weights}: expected a tensor {name!r}, found tensors {there}")
    return start


def matrix(checkpoint: Checkpoint, start: str, table: PromptTable) -> np.ndarray:
    """What the MLP makes of a table, [rows, 2 * layers * heads * head_dim].

    Raises:
        CheckpointError: a part is missing, or does not fit.
    """
    name = f"{start}{table.embedding}.weight"
    if name not in checkpoint.shapes:
        raise CheckpointError(f"{checkpoint.weights}: expected a tensor {name!r} beside {table.mlp!r}, found none")
    return through_mlp(checkpoint, f"{start}{table.mlp}", checkpoint.array(name))


def through_mlp(checkpoint: Checkpoint, stem: str, inputs: np.ndarray, activation: str = "tanh") -> np.ndarray:
    """What the MLP under a name makes of inputs [rows, width].

    Raises:
        CheckpointError: there is no such MLP, or it does not fit.
    """
    return evaluated(inputs, _mlp(checkpoint, stem), f"{checkpoint.weights}: {stem}", activation)


def untrained(
    checkpoint: Checkpoint, stems: Iterable[str], framework: str, deviation: float | None = None
) -> list[str]:
    """A warning where the MLPs under all these names are as they begin; embeddings hardly move when they are trained.

    Args:
        checkpoint: that has the MLPs, so that `through_mlp` did not raise.
        stems: their names.
        framework: of which the warning speaks.
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
        there = [name for name in names if name in checkpoint.shapes]
        if len(there) == 1:
            raise CheckpointError(f"{checkpoint.weights}: expected {' and '.join(names)}, found {there[0]} alone")
        if there:
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
    """The keys and values of a site in a matrix whose slots are counted by the decoder, as these code bases do.

    An encoder with fewer layers leaves the slots behind its last unread; one with more has none for them.
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
