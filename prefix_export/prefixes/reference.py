"""The source framework's model for one task: PEFT itself for its own adapters, otherwise transformers."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from prefix_export import formats
from prefix_export.errors import CheckpointError, PrefixExportError
from prefix_export.formats.peft import reader as peft_format
from prefix_export.models import BaseModel, cached
from prefix_export.models.generation_defaults import followed_config, logits_processors
from prefix_runtime import Prefix
from prefix_runtime.prefix.prefix import DECODER

_PEFT_WEIGHTS = "adapter_model.safetensors"


class Reference(Protocol):
    """A source framework's model for one task; `name` is the framework's name and version."""

    name: str

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """The logits [sequence, vocab] after each token of a prompt: float64 in double precision, otherwise float32."""

    def greedy(self, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """The framework's own new tokens, including the end token."""


class CacheReference:
    """transformers' own model with a prefix as its initial cache; None for no prefix. `make_cache` makes the cache."""

    def __init__(
        self, model: PreTrainedModel, prefix: Prefix | None, make_cache: Callable[[], DynamicCache] = DynamicCache
    ) -> None:
        self.name = f"transformers {version('transformers')}"
        self._model, self._prefix, self._make_cache = model, prefix, make_cache

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Reference`."""
        cache, base = self._cache()
        return _numpy(self._forward(token_ids, cache, base))

    def greedy(self, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """See `Reference`."""
        cache, position = self._cache()
        ends = _end_tokens(self._model)
        config = self._model.generation_config or GenerationConfig()
        process: Any = logits_processors(self._model, config, torch.tensor([list(token_ids)]), new_tokens)
        tokens: list[int] = []
        step = list(token_ids)
        while len(tokens) < new_tokens and not (tokens and tokens[-1] in ends):
            logits = self._forward(step, cache, position)
            position += len(step)
            step = [int(process(torch.tensor([[*token_ids, *tokens]]), logits[-1:].float())[0].argmax())]
            tokens += step
        return tokens

    def keys_and_values(self, token_ids: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each layer's rotated keys and values of prefix and text, [num_key_value_heads, length, head_dim] float32."""
        cache, base = self._cache()
        self._forward(token_ids, cache, base)
        yield from cached(cache)

    def _cache(self) -> tuple[DynamicCache, int]:
        cache = self._make_cache()
        if self._prefix is None:
            return cache, 0
        for index, layer in enumerate(self._prefix.sites[DECODER]):
            dtype = self._model.dtype
            key, value = (
                torch.tensor(np.asarray(array, np.float32))[None].to(dtype) for array in (layer.key, layer.value)
            )
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
    """The file or folder that a prefix was folded from, and the name of its part; a single part has the empty name."""

    path: Path
    part: str = ""


@dataclass(frozen=True)
class SourcedPrefixes:
    """The prefix of each task, and the checkpoint that it was folded from; None if that is not known."""

    prefixes: Mapping[str, Prefix]
    sources: Mapping[str, PrefixSource | None]

    def under(self, task: str | None) -> tuple[Prefix | None, PrefixSource | None]:
        """The prefix and the checkpoint of a task; (None, None) for the bare model."""
        return (None, None) if task is None else (self.prefixes[task], self.sources[task])


class PeftReference:
    """An adapter's model as PEFT loads and runs it; `task` is the number of a multitask prompt's task, or None."""

    def __init__(self, model: Any, task: int | None = None) -> None:
        self.name = f"peft {version('peft')}"
        self._model = model
        self._tasks = {} if task is None else {"task_ids": torch.tensor([task])}

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Reference`."""
        ids = torch.tensor([list(token_ids)])
        with torch.no_grad():
            output = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), **self._tasks)
        # A soft prompt has logits too, before those of the text.
        return _numpy(output.logits[0, -ids.shape[1] :])

    def greedy(self, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """See `Reference`."""
        ids = torch.tensor([list(token_ids)])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that it counts positions itself behind a soft prompt
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                **self._tasks,
            )
        tokens: list[int] = output[0, ids.shape[1] :].tolist()
        return tokens


@contextmanager
def reference(base: BaseModel, prefix: Prefix | None, source: PrefixSource | None) -> Iterator[Reference]:
    """The source framework's model with a prefix, or without one, that generates greedily.

    Args:
        base: the model.
        prefix: the prefix; None for the bare model.
        source: the checkpoint of the prefix; None compares with transformers and the prefix as its cache.

    Raises:
        PrefixExportError: the source is a PEFT adapter and PEFT is not installed: install it, or build without
            verification.
        CheckpointError: PEFT itself cannot load the adapter.
    """
    with _plain_generation(base.model), _reference(base, prefix, source) as model:
        yield model


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
        # PEFT loads a folder with these names, and would load pickles too: give it only tensors.
        (Path(folder) / peft_format.CONFIG_NAME).write_text(json.dumps(dict(adapter.config)), encoding="utf-8")
        save_file(dict(adapter.tensors), Path(folder) / _PEFT_WEIGHTS)
        try:
            wrapped = PeftModel.from_pretrained(model, folder)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{adapter.where}: PEFT itself cannot load the adapter: {error}") from error
    yield PeftReference(wrapped.eval(), adapter.task)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Generate greedily within the block, with the model's own defaults that the runtime follows."""
    before = model.generation_config
    model.generation_config = followed_config(model)
    try:
        yield
    finally:
        model.generation_config = before


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {ends}


def _numpy(logits: torch.Tensor) -> np.ndarray:
    array: np.ndarray = (logits if logits.dtype == torch.float64 else logits.float()).numpy()
    return array
