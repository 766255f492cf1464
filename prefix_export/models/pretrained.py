"""All calls of transformers' loaders, which never run code that comes with a model.

A loader raises one of `FAILURES`; `reason` turns it into one line for a `ModelError`.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from optimum.exporters.tasks import TasksManager
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from . import gguf_model
from .source import ModelSource

FAILURES = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    ImportError,
    OverflowError,
    ZeroDivisionError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    HFValidationError,
    StrictDataclassError,
)
"""Exceptions of transformers' loaders for files that are missing, damaged or of another kind."""

_TASK = "text-generation"
# A config.json may ask for outputs in another form, and for no cache; this package does not expect either.
_PLAIN_OUTPUTS: Mapping[str, Any] = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_cache": True,
}
# A config.json may name implementations that are not installed, or kernels on the Hub, which are code. With None,
# transformers chooses: PyTorch's own attention (sdpa) if the architecture has it.
_PLAIN_CODE: Mapping[str, Any] = {"attn_implementation": None, "experts_implementation": None}
# transformers would apply an adapter beside a model's weights (transformers#43746). It does not find one in a folder
# that does not exist.
_NO_ADAPTER: Mapping[str, Any] = {"adapter_kwargs": {"subfolder": "prefix-export-takes-no-adapter-from-here"}}


def configuration(source: ModelSource) -> PreTrainedConfig:
    """A model's configuration, from its config.json or its GGUF file."""
    with _folder(source) as (root, arguments):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            root, trust_remote_code=False, **arguments, **_PLAIN_OUTPUTS
        )
    for leftover in ("auto_map", "quantization_config"):  # checked before, or empty
        vars(config).pop(leftover, None)
    return config


def weights(source: ModelSource, config: PreTrainedConfig) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A causal language model in float32, and transformers' report of its tensors (`output_loading_info`)."""
    model_class = TasksManager.get_model_class_for_task(_TASK, framework="pt", model_type=config.model_type)
    plain = gguf_model.loading_arguments() if source.gguf is not None else {}
    with _folder(source) as (root, arguments):
        model, report = model_class.from_pretrained(
            root,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            **arguments,
            **plain,
            **_PLAIN_CODE,
            **_NO_ADAPTER,
        )
    return model.eval(), report


def tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """A model's tokenizer."""
    with _folder(source) as (root, arguments):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(root, trust_remote_code=False, **arguments)
    return tokenizer


def tokenizer_in(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder without a model; the configuration of a model chooses its class."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    return tokenizer


def model_without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model of a configuration, with uninitialized weights."""
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False, **_PLAIN_CODE
        )
    return model


def configuration_of(model_type: str, values: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration of transformers' own class for an architecture."""
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **values)
    return config


def reason(error: BaseException, source: ModelSource) -> str:
    """The first line of a loader's exception, without temporary folders and without advice to trust foreign code."""
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text:
        return "custom code of the repository, which prefix-export never runs"
    return gguf_model.TEMPORARY.sub(lambda _: source.root, text.splitlines()[0])


@contextmanager
def _folder(source: ModelSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """The folder or Hub id for transformers' loaders, and further arguments."""
    if source.gguf is None:
        yield source.root, source.arguments
        return
    with gguf_model.alone(source.gguf) as folder, gguf_model.silent():
        yield str(folder), {"gguf_file": source.gguf.name}
