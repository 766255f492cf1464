"""The sizes that a TensorRT engine is made for, and what goes in and comes out of it: both follow from a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.bundle.manifest import Manifest
from prefix_runtime.checks import is_whole
from prefix_runtime.errors import BundleError, RequestError

DEFAULT_MOST_ROWS = 8
"""Rows that decode together, as `engine.DEFAULT_MAX_BATCH`."""

PREFILL, DECODE = 0, 1
"""The places of an engine's profiles."""

Shape = tuple[int, ...]
CACHE_TYPES = {"fp32": "float32", "fp16": "float16"}
_PRECISIONS = ("fp32", "fp16")
"""Of weights, in any graph of standard operators; int8 as it is written for the target tensorrt, not in blocks."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: its numpy type's name, and its shape with -1 for what varies."""

    name: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        sizes = ", ".join("?" if size < 0 else str(size) for size in self.shape)
        return f"{self.dtype} [{sizes}]"


@dataclass(frozen=True)
class Limits:
    """How large a run may be.

    Attributes:
        batch: rows that decode together; prompts run one by one.
        prompt: tokens of a prompt.
        prefix: positions that the prefix of a prompt takes, where prefixes are fed.
        length: positions of a row in all, those of a fed prefix included.
    """

    batch: int
    prompt: int
    prefix: int
    length: int


@dataclass(frozen=True)
class Profile:
    """Ranges of one kind of run: for each input the least, the usual and the largest shape; of a scalar its values."""

    name: str
    inputs: Mapping[str, tuple[Shape, Shape, Shape]]


def limits(
    manifest: Manifest, batch: int | None = None, prompt: int | None = None, prefix: int | None = None
) -> Limits:
    """The limits that a bundle's engine is made for; None takes all that the model has room for.

    Args:
        manifest: the bundle's.
        batch: rows that decode together; None takes 8.
        prompt: tokens of a prompt.
        prefix: positions of a fed prefix; None takes the longest task's.

    Raises:
        RequestError: a limit out of its range, or too small for the bundle's tasks.
    """
    room = _room(manifest)
    longest = max((task.prefix_length for task in manifest.tasks.values()), default=0)
    batch = DEFAULT_MOST_ROWS if batch is None else batch
    prompt = room - 1 if prompt is None else prompt
    is_fed = manifest.mode == "feed"
    if prefix is not None and not is_fed:
        raise RequestError(f"max_prefix: expected none, as the graph holds its prefixes, found {prefix}")
    prefix = (longest if prefix is None else prefix) if is_fed else 0
    _check("max_batch", batch, 1, 4096)
    _check("max_prompt", prompt, 1, room - 1)
    if is_fed and is_whole(prefix, 0) and prefix < longest:
        task = max(manifest.tasks, key=lambda name: manifest.tasks[name].prefix_length)
        raise RequestError(f"max_prefix: expected {longest} or more, the length of the task {task!r}, found {prefix}")
    _check("max_prefix", prefix, 0, manifest.max_length - 2)
    return Limits(batch, prompt, prefix, room)


def profiles(manifest: Manifest, largest: Limits) -> tuple[Profile, Profile]:
    """The profile of a prompt, which runs alone, and of a decode step, at `PREFILL` and `DECODE`."""
    one, usual_prompt = (1, 1, 1), -(-largest.prompt // 2)
    prefix = (0, largest.prefix, largest.prefix)
    prompt = (1, usual_prompt, largest.prompt)
    prefill = _ranges(manifest, one, prompt, prefix, kept=(1, 1, largest.prompt))
    past = (1, -(-largest.length // 2), largest.length - 1)
    decode = _ranges(manifest, (1, 1, largest.batch), one, past, kept=one)
    return Profile("prefill", prefill), Profile("decode", decode)


def covering(manifest: Manifest, largest: Limits) -> Profile:
    """One profile of prompts and decode steps, of any rows: for who cannot choose between two."""
    past = (0, -(-largest.length // 2), largest.length - 1)
    sequence, kept = (1, 1, largest.prompt), (0, 1, largest.prompt)
    return Profile("any", _ranges(manifest, (1, 1, largest.batch), sequence, past, kept))


def tensors(manifest: Manifest) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs and the outputs that an engine of a bundle's graph must have.

    Raises:
        BundleError: a graph that no engine is made of.
    """
    if manifest.flavour != "portable" or manifest.cache not in CACHE_TYPES:
        raise BundleError(
            f"TensorRT: expected a graph in standard operators, found one of the {manifest.flavour} flavour for "
            f"{manifest.target}; build the bundle with --target tensorrt"
        )
    if manifest.precision not in _PRECISIONS and (manifest.precision, manifest.target) != ("int8", "tensorrt"):
        raise BundleError(
            f"TensorRT: expected a graph in {' or '.join(_PRECISIONS)}, or in int8 for it, found one in "
            f"{manifest.precision} for {manifest.target}; build the bundle with --target tensorrt --precision fp16 or "
            "int8"
        )
    inputs = [Tensor(name, "int64", (-1, -1)) for name in contract.TOKEN_INPUTS]
    inputs += _pairs(manifest, contract.PAST)
    inputs.append(Tensor(contract.NUM_LOGITS_TO_KEEP, "int64", ()))
    if has_task_id(manifest):
        inputs.append(Tensor(contract.TASK_ID, "int64", (-1,)))
    logits = Tensor(contract.LOGITS, "float32", (-1, -1, manifest.geometry.vocab_size))
    return tuple(inputs), (logits, *_pairs(manifest, contract.PRESENT))


def has_task_id(manifest: Manifest) -> bool:
    """Whether rows say by a number which of the graph's prefixes is theirs."""
    return manifest.mode == "bake" and len(manifest.tasks) > 1


def _room(manifest: Manifest) -> int:
    """Positions of past and new tokens that a row may have."""
    if manifest.mode == "feed":
        return manifest.max_length
    context = manifest.geometry.context_length
    return max(
        min(manifest.max_length - task.prefix_length, context - task.position_base) for task in manifest.tasks.values()
    )


def _ranges(
    manifest: Manifest, batch: Shape, sequence: Shape, past: Shape, kept: Shape
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """For each input the three shapes, of three batches, sequences and pasts."""

    def shape(tensor: Tensor, place: int) -> Shape:
        row, new, before = batch[place], sequence[place], past[place]
        if len(tensor.shape) == 4:
            return (row, tensor.shape[1], before, tensor.shape[3])
        if len(tensor.shape) == 2:
            return (row, before + new if tensor.name == contract.ATTENTION_MASK else new)
        return (row,) if tensor.shape else (kept[place],)

    given, _ = tensors(manifest)
    return {tensor.name: (shape(tensor, 0), shape(tensor, 1), shape(tensor, 2)) for tensor in given}


def _pairs(manifest: Manifest, name: str) -> Iterator[Tensor]:
    dtype = CACHE_TYPES[manifest.cache]
    for index, layer in enumerate(manifest.geometry.layers):
        for part in contract.PARTS:
            yield Tensor(
                contract.tensor_name(name, index, part), dtype, (-1, layer.key_value_heads, -1, layer.head_dim)
            )


def _check(name: str, value: int, least: int, most: int) -> None:
    if not is_whole(value, least, most):
        raise RequestError(f"{name}: expected {least} to {most}, found {value!r}")
