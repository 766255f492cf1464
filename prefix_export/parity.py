"""The source framework against the exported graph: the same inputs, the same answers."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from prefix_runtime import Engine, Manifest, Prefix

from . import formats
from .errors import CheckpointError, ParityError, PrefixExportError
from .formats import peft as peft_format
from .models import BaseModel, cached

ABSOLUTE_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.5, "fp16 weights": 5e-2, "bf16 weights": 0.4}
"""Largest difference of a logit that is accepted, by what keys and values are kept in; or where all is float16."""

RELATIVE_TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.1, "fp16 weights": 5e-3, "bf16 weights": 4e-2}
"""The same as a part of the largest logit, for models whose logits go beyond 10, where float32 itself is coarser."""

_PROMPT_LENGTHS = (1, 7, 33)
_NEW_TOKENS = 12
_PEFT_WEIGHTS = "adapter_model.safetensors"


class Reference(Protocol):
    """A source framework's model under one task; `name` says which framework."""

    name: str

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """The logits [sequence, vocab] float32 after each token of a prompt."""

    def greedy(self, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """The framework's own new tokens, an end token included."""


@dataclass(frozen=True)
class TaskParity:
    """One task's comparison.

    Attributes:
        reference: with what.
        largest_logit_difference: over all positions of all prompts.
        tolerance: the difference that is accepted.
        greedy_tokens_equal: whether the tokens agree, up to the first tie.
        ties: answers, of each prompt alone and in a batch, that part where two tokens are closer than twice the
            tolerance, as each may be off by it; nothing behind is compared.
        prompts: that were compared.
    """

    reference: str
    largest_logit_difference: float
    tolerance: float
    greedy_tokens_equal: bool
    ties: int
    prompts: int

    @property
    def agrees(self) -> bool:
        """Whether the graph may be shipped."""
        return self.greedy_tokens_equal and self.largest_logit_difference <= self.tolerance


class CacheReference:
    """transformers' own model with a prefix as its initial cache, or without one."""

    def __init__(self, model: PreTrainedModel, prefix: Prefix | None) -> None:
        self.name = f"transformers {version('transformers')}"
        self._model, self._prefix = model, prefix

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Reference`."""
        cache, base = self._cache()
        return _numpy(self._forward(token_ids, cache, base))

    def greedy(self, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """See `Reference`."""
        cache, position = self._cache()
        ends = _end_tokens(self._model)
        tokens: list[int] = []
        step = list(token_ids)
        while len(tokens) < new_tokens and not (tokens and tokens[-1] in ends):
            logits = self._forward(step, cache, position)
            position += len(step)
            step = [int(logits[-1].argmax())]
            tokens += step
        return tokens

    def keys_and_values(self, token_ids: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each layer's keys and values of prefix and text, [num_key_value_heads, length, head_dim] float32, rotated."""
        cache, base = self._cache()
        self._forward(token_ids, cache, base)
        yield from cached(cache)

    def _cache(self) -> tuple[DynamicCache, int]:
        cache = DynamicCache()
        if self._prefix is None:
            return cache, 0
        for index, layer in enumerate(self._prefix.sites["decoder"]):
            key, value = (torch.tensor(np.asarray(array, np.float32))[None] for array in (layer.key, layer.value))
            cache.update(key, value, index)
        return cache, self._prefix.position_base

    def _forward(self, token_ids: Sequence[int], cache: DynamicCache, position: int) -> torch.Tensor:
        ids = torch.tensor([list(token_ids)])
        with torch.no_grad():
            output = self._model(
                input_ids=ids,
                attention_mask=torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.int64),
                position_ids=torch.arange(position, position + ids.shape[1])[None],
                past_key_values=cache,
                use_cache=True,
            )
        logits: torch.Tensor = output.logits[0]
        return logits


@dataclass(frozen=True)
class PrefixSource:
    """Where a prefix was folded from: a file or folder, and which of its parts; a single one's name is empty."""

    path: Path
    part: str = ""


class PeftReference:
    """PEFT's own model of an adapter, as PEFT loads and runs it; `task` is one of a multitask prompt's, or None."""

    def __init__(self, model: Any, task: int | None = None) -> None:
        self.name = f"peft {version('peft')}"
        self._model = model
        self._tasks = {} if task is None else {"task_ids": torch.tensor([task])}

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Reference`."""
        ids = torch.tensor([list(token_ids)])
        with torch.no_grad():
            output = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), **self._tasks)
        # Behind those of a soft prompt, if there is one.
        return _numpy(output.logits[0, -ids.shape[1] :])

    def greedy(self, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """See `Reference`."""
        ids = torch.tensor([list(token_ids)])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # behind a soft prompt it counts positions itself, and says so
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                **self._tasks,
            )
        tokens: list[int] = output[0, ids.shape[1] :].tolist()
        return tokens


@contextmanager
def reference(base: BaseModel, prefix: Prefix | None, source: PrefixSource | None) -> Iterator[Reference]:
    """The source framework under a prefix, or without one, generating greedily; see `observe` for the arguments.

    Raises:
        PrefixExportError: the source is an adapter of PEFT's and PEFT is not installed.
    """
    with _plain_generation(base.model), _reference(base, prefix, source) as found:
        yield found


def _reference(
    base: BaseModel, prefix: Prefix | None, source: PrefixSource | None
) -> AbstractContextManager[Reference]:
    if source is not None:
        reader, checkpoint = formats.find_reader(source.path)
        adapter = peft_format.saved(checkpoint, source.part) if reader is peft_format else None
        if adapter is not None:
            return _peft_reference(base.model, adapter)
    return nullcontext(CacheReference(base.model, prefix))


@contextmanager
def _peft_reference(model: PreTrainedModel, adapter: peft_format.Saved) -> Iterator[Reference]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise PrefixExportError(
            f"{adapter.where}: expected PEFT to compare the exported graph with, found it not installed; "
            "pip install 'prefix-export[peft]', or build with --no-verify"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        # PEFT loads folders with these names alone, and loads pickles if it finds any: it is shown tensors alone.
        (Path(folder) / peft_format.CONFIG_NAME).write_text(json.dumps(dict(adapter.config)), encoding="utf-8")
        save_file(dict(adapter.tensors), Path(folder) / _PEFT_WEIGHTS)
        try:
            wrapped = PeftModel.from_pretrained(model, folder)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{adapter.where}: PEFT itself cannot load the adapter: {error}") from error
    yield PeftReference(wrapped.eval(), adapter.task)


@dataclass(frozen=True)
class Expectation:
    """What a reference answers to some prompts: logits [sequence, vocab] float32 of each, and greedy tokens."""

    reference: str
    prompts: tuple[tuple[int, ...], ...]
    logits: tuple[np.ndarray, ...]
    tokens: tuple[tuple[int, ...], ...]


def observe(base: BaseModel, prefix: Prefix | None, source: PrefixSource | None, max_length: int) -> Expectation:
    """What the source framework answers under a prefix, or without one.

    Args:
        base: the frozen model.
        prefix: as it was folded.
        source: what it was folded from; PEFT's adapters are run by PEFT itself, everything else by
            transformers with the prefix as its cache.
        max_length: positions that prefix and text may take together.

    Raises:
        PrefixExportError: the source is an adapter of PEFT's and PEFT is not installed.
    """
    room = base.geometry.room(prefix, max_length)
    prompts = _prompts(base.geometry.vocab_size, room)
    with reference(base, prefix, source) as found:
        logits = tuple(_on_disk(found.logits(prompt)) for prompt in prompts)
        tokens = tuple(tuple(found.greedy(prompt, min(_NEW_TOKENS, room - len(prompt)))) for prompt in prompts)
    return Expectation(found.name, prompts, logits, tokens)


def compare(expectation: Expectation, engine: Engine, task: str | None) -> TaskParity:
    """The exported graph's answers against the expected ones.

    Raises:
        ParityError: they do not agree: by how much, and what is accepted.
    """
    expected = list(zip(expectation.prompts, expectation.logits, expectation.tokens, strict=True))
    # Not Python's max, which drops a NaN.
    difference = float(np.max([np.abs(logits - engine.logits(prompt, task)).max() for prompt, logits, _ in expected]))
    largest = max(float(np.abs(logits).max()) for logits in expectation.logits)
    manifest = engine.bundle.manifest
    kind = _kind(manifest)
    tolerance = max(ABSOLUTE_TOLERANCES[kind], RELATIVE_TOLERANCES[kind] * largest)
    # Alone and together: what pads rows on the left may count positions and lengths otherwise.
    alone = [engine.generate(token_ids=prompt, task=task, max_new_tokens=len(tokens)) for prompt, _, tokens in expected]
    counts = [len(tokens) for tokens in expectation.tokens]
    together = engine.generate(token_ids=list(expectation.prompts), task=task, max_new_tokens=counts)
    partings = [
        _parting(tokens, result.token_ids, engine, task, prompt)
        for results in (alone, together)
        for (prompt, _, tokens), result in zip(expected, results, strict=True)
    ]
    ties = sum(0 < gap <= 2 * tolerance for gap in partings)
    equal = all(gap <= 2 * tolerance for gap in partings)
    result = TaskParity(expectation.reference, difference, tolerance, equal, ties, len(expected))
    _refuse_disagreement(task, result, manifest.cache)
    return result


def _kind(manifest: Manifest) -> str:
    """What rounds in a bundle's graph, as tolerances are named."""
    if manifest.precision == "bf16":
        return "bf16 weights"
    # For a GPU activations are of 16 bits, as keys and values are, also where the weights have fewer.
    is_half = manifest.precision == "fp16" or (manifest.cache == "fp16" and manifest.target in ("cuda", "tensorrt"))
    return "fp16 weights" if is_half else manifest.cache


def _parting(
    expected: Sequence[int], found: Sequence[int], engine: Engine, task: str | None, prompt: Sequence[int]
) -> float:
    """How far apart the engine's logits of the two tokens are where its greedy tokens part from the expected; else 0.

    Two tokens closer than both their accepted differences are a tie, which either side may break its way.
    """
    for index, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            logits = engine.logits([*prompt, *expected[:index]], task)[-1]
            return max(float(abs(logits[left] - logits[right])), float(np.finfo(np.float32).tiny))
    return 0.0 if len(expected) == len(found) else float("inf")


def _prompts(vocab_size: int, room: int) -> tuple[tuple[int, ...], ...]:
    """Random prompts, the same every time; as long as there is room for them and a new token."""
    random = np.random.default_rng(0)
    lengths = sorted({min(length, room - 1) for length in _PROMPT_LENGTHS})
    return tuple(tuple(random.integers(vocab_size, size=length).tolist()) for length in lengths if length > 0)


def _on_disk(array: np.ndarray) -> np.ndarray:
    """A copy in a file without a name: logits of many tasks are many gigabytes, and are looked at once."""
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, array.dtype, "w+", shape=array.shape)
    mapped[:] = array
    return mapped


def _refuse_disagreement(task: str | None, result: TaskParity, cache: str) -> None:
    if not result.agrees:
        what = "the bare model" if task is None else f"task {task!r}"
        tokens = "equal" if result.greedy_tokens_equal else "different"
        advice = (
            "; where keys and values go beyond the scales of 8 bits, more and other text widens them: --held-out, or "
            "build with --cache fp32"
        )
        raise ParityError(
            f"{what}: expected the exported graph to agree with {result.reference} within {result.tolerance:.1e} "
            f"and in greedy tokens, found logits {result.largest_logit_difference:.1e} apart, {tokens} tokens"
            + (advice if cache == "int8" else "")
        )


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Generate greedily for a while, whatever the model's own defaults; its end tokens stay."""
    before = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=getattr(before, "eos_token_id", None), pad_token_id=getattr(before, "pad_token_id", None)
    )
    try:
        yield
    finally:
        model.generation_config = before


def _end_tokens(model: PreTrainedModel) -> set[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        return set()
    return set(found) if isinstance(found, list) else {found}


def _numpy(logits: torch.Tensor) -> np.ndarray:
    array: np.ndarray = logits.float().numpy()
    return array
