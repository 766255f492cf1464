"""AdapterHub's `adapters`: prefix tuning, with a bottleneck MLP or flat, at each registered site.

Names contain `prefix_tunings.TASK.LOCATION.` before one of two sets of tensors:

- with an MLP: `wte.weight` [prefix_length, width], `control_trans.0` and `control_trans.2`
- flat: `control_trans` [prefix_length * 2 * layers * heads * head_dim]

The file repeats the same tensors for every layer that shares them. AdapterHub joins the prefix to the keys after
rotation and never stores it in the cache, so text begins at position 0. T5 counts relative positions differently; the
prefix's metadata records this (`relative_position_bias`).

Source: adapter-hub/adapters 1.x, `src/adapters/methods/prefix_tuning.py` at 08464c2, `loading.py` at 086d7f2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import BOTH, ModelShape
from prefix_runtime import LayerPrefix, PrefixMismatchError, Source
from prefix_runtime.checks import is_whole

from .shared.checkpoint import Checkpoint
from .shared.reparameterised import through_mlp, untrained
from .shared.trained import Trained, folded, make_prefix

NAME = "adapterhub"
TITLE = "AdapterHub prefix tuning"

_NAME = re.compile(r"(?P<start>(?:.*\.)?prefix_tunings\.(?P<task>[^.]+)\.(?P<location>[a-z_]+_prefix))\.(?P<part>.+)")
_SITES = {"self_prefix": "decoder", "cross_prefix": "cross", "encoder_prefix": "encoder"}
_CONFIG_NAME = "adapter_config.json"
_METHOD = "prefix_tuning"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a pool of prefix tunings."""
    return any(_NAME.fullmatch(name) for name in checkpoint.shapes)


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The config, and the tensors of each location."""
    config = _config(checkpoint)
    settings = {key: str(value) for key, value in config.items() if isinstance(value, str | int | float | list)}
    tensors = {}
    for location, start in _locations(checkpoint).items():
        names = [name for name in checkpoint.shapes if name.startswith(f"{start}.")]
        tensors[location] = ", ".join(
            f"{name.removeprefix(f'{start}.')} {' x '.join(map(str, checkpoint.shapes[name]))}" for name in names
        )
    return {**settings, **tensors}


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`."""
    config, locations = _config(checkpoint), _locations(checkpoint)
    _refuse_what_is_more_than_a_prefix(checkpoint, config)
    activation = str(config.get("non_linearity", "tanh")).lower()
    sites = {}
    if len(locations) > len(shape.sites):
        raise PrefixMismatchError(
            f"{checkpoint.weights}: holds prefixes for {', '.join(locations)}: expected a model with as many kinds of "
            f"attention, found {shape.name!r} ({shape.kind})"
        )
    for location, start in locations.items():
        site = _site(checkpoint, location, shape)
        where = f"{checkpoint.weights}: {start}"
        matrix = _matrix(checkpoint, start, config, activation)
        sites[site] = _with_left_out(matrix, shape, site, _left_out(checkpoint, config), where)
    prefix = make_prefix(
        sites,
        moves_positions=False,
        source=Source(NAME, checkpoint.sha256),
        weights=checkpoint.weights,
        metadata={"relative_position_bias": "text-moved"} if shape.kind == BOTH else {},
    )
    stems = [f"{start}.control_trans" for start in locations.values() if f"{start}.wte.weight" in checkpoint.shapes]
    return Trained({"": prefix}, tuple(untrained(checkpoint, stems, "adapters") if stems else ()))


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    settings = (checkpoint.config(_CONFIG_NAME) or {}).get("config")
    return settings if isinstance(settings, dict) else {}


def _locations(checkpoint: Checkpoint) -> dict[str, str]:
    """The locations of the checkpoint's one prefix tuning, and the start of the names of each one's first tensors."""
    matches = [match for name in checkpoint.shapes if (match := _NAME.fullmatch(name))]
    tasks = sorted({match["task"] for match in matches})
    if len(tasks) != 1:
        raise CheckpointError(f"{checkpoint.weights}: expected one prefix tuning, found {', '.join(tasks) or 'none'}")
    starts: dict[str, str] = {}
    for match in matches:
        first = f"{starts.setdefault(match['location'], match['start'])}.{match['part']}"
        if first not in checkpoint.shapes or not _is_same(checkpoint, first, match.string):
            raise CheckpointError(
                f"{checkpoint.weights}: {match.string}: expected the same at every layer, found another"
            )
    return starts


def _is_same(checkpoint: Checkpoint, left: str, right: str) -> bool:
    return left == right or np.array_equal(checkpoint.array(left), checkpoint.array(right), equal_nan=True)


def _refuse_what_is_more_than_a_prefix(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    reasons = {
        "gates, which depend on the text": config.get("use_gating")
        or any("gates." in name for name in checkpoint.shapes),
        "other adapters beside the prefix": any(not _NAME.fullmatch(name) for name in checkpoint.shapes)
        or config.get("architecture", _METHOD) != _METHOD,
    }
    for reason, applies in reasons.items():
        if applies:
            raise CheckpointError(
                f"{checkpoint.weights}: expected a prefix for every layer and nothing else, found {reason}"
            )


def _left_out(checkpoint: Checkpoint, config: Mapping[str, Any]) -> set[int]:
    """Layers without a prefix, by their number in the whole model: decoder layers follow the encoder layers."""
    left_out = config.get("leave_out") or []
    if not isinstance(left_out, list) or not all(isinstance(index, int) for index in left_out):
        raise CheckpointError(
            f"{checkpoint.config_path(_CONFIG_NAME)}: leave_out: expected numbers of layers, found {left_out!r}"
        )
    return set(left_out)


def _with_left_out(
    matrix: np.ndarray, shape: ModelShape, site: str, left_out: set[int], where: str
) -> tuple[LayerPrefix, ...]:
    """A site's layers. Layers that were left out get an empty prefix, because the matrix has no slots for them."""
    layers = shape.site(site, where)
    first = len(shape.sites["encoder"]) if shape.kind == BOTH and site != "encoder" else 0
    trained = [index for index in range(len(layers)) if first + index not in left_out]
    if not trained:
        raise CheckpointError(f"{where}: expected a prefix for at least one layer, found all left out")
    trained_layers = dict(zip(trained, folded(matrix, [layers[index] for index in trained], where), strict=True))
    empty = [np.empty((layer.key_value_heads, 0, layer.head_dim), np.float32) for layer in layers]
    return tuple(trained_layers.get(index, LayerPrefix(empty[index], empty[index])) for index in range(len(layers)))


def _site(checkpoint: Checkpoint, location: str, shape: ModelShape) -> str:
    if len(shape.sites) == 1:
        (site,) = shape.sites
        return site
    if location not in _SITES:
        raise PrefixMismatchError(
            f"{checkpoint.weights}: {location}: expected one of {', '.join(_SITES)}, found another; it is not read"
        )
    return _SITES[location]


def _matrix(checkpoint: Checkpoint, start: str, config: Mapping[str, Any], activation: str) -> np.ndarray:
    flat = f"{start}.control_trans"
    if flat in checkpoint.shapes:
        length = config.get("prefix_length")
        numbers = checkpoint.array(flat)
        if not is_whole(length, 1) or numbers.ndim != 1 or numbers.size % length:
            raise CheckpointError(
                f"{checkpoint.config_path(_CONFIG_NAME)}: prefix_length: expected one that divides the {numbers.size} "
                f"numbers of {flat}, found {length!r}"
            )
        return numbers.reshape(length, -1)
    table = f"{start}.wte.weight"
    if table not in checkpoint.shapes:
        raise CheckpointError(f"{checkpoint.weights}: expected a tensor {table!r}, found none")
    return through_mlp(checkpoint, f"{start}.control_trans", checkpoint.array(table), activation)
