"""Compare a task's head with a base model: width, labels, names and the model that it was trained on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
)

from prefix_export.formats.p_tuning_v2 import BASE_MODULE
from prefix_export.models.model_shape import ModelShape
from prefix_runtime import Prefix

_CLASSES = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "QUESTION_ANS": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}
_LAST = ("classifier.weight", "score.weight", "out_proj.weight")
"""Ends of the names of weights that have one row per label."""
_NO_LABELS = {0: "LABEL_0", 1: "LABEL_1"}  # transformers' default


def lint_head(prefix: Prefix, shape: ModelShape) -> Iterator[str]:
    """Warnings if a prefix's head belongs to another model, one line each."""
    yield from _shapes(prefix.head, shape)
    if prefix.head and shape.config is not None:
        yield from _labels(prefix.head, shape.config)
        yield from _names(prefix, shape.config)
        yield from _trained_on(prefix, shape.config)


def _shapes(head: Mapping[str, np.ndarray], shape: ModelShape) -> Iterator[str]:
    for name, array in head.items():
        if array.ndim != 2:  # a weight is [outputs, inputs]
            continue
        array_shape = array.shape
        if array_shape[1] != shape.hidden_size:
            yield (
                f"head {name}: takes {array_shape[1]} numbers, but {shape.name!r} has a hidden size of "
                f"{shape.hidden_size}: it does not belong to this model"
            )
        bias = head.get(f"{name.removesuffix('weight')}bias")
        if bias is not None and bias.shape != array_shape[:1]:
            shown = list(bias.shape)
            yield f"head {name}: has {array_shape[0]} outputs, its bias has shape {shown}: they do not belong together"


def _labels(head: Mapping[str, np.ndarray], config: PreTrainedConfig) -> Iterator[str]:
    labels = config.id2label
    if not labels or labels == _NO_LABELS:
        return
    for name, array in head.items():
        if name.endswith(_LAST) and array.ndim == 2 and len(array) != len(labels):
            yield (
                f"head {name}: has {len(array)} labels, but the model's configuration names {len(labels)} (id2label)"
            )


def _names(prefix: Prefix, config: PreTrainedConfig) -> Iterator[str]:
    """A warning if the head lacks weights that transformers' class for the task has; PEFT uses the same names."""
    task = prefix.metadata.get("task_type", "")
    expected = head_names(config, task)
    lacking = [name for name in expected if name not in prefix.head]
    if lacking:
        yield (
            f"head: expected {', '.join(expected)}, as a {config.model_type!r} has for {task}, found "
            f"{', '.join(sorted(prefix.head))}: it does not belong to this model"
        )


def _trained_on(prefix: Prefix, config: PreTrainedConfig) -> Iterator[str]:
    trained_on = prefix.metadata.get(BASE_MODULE)
    own = getattr(MODEL_MAPPING.get(type(config), None), "base_model_prefix", None)
    if trained_on and own and trained_on != own:
        yield (
            f"head and prefix were trained on a model of kind {trained_on!r}, but this one is {own!r}: they do not "
            "belong to it"
        )


def head_names(config: PreTrainedConfig, task: str) -> list[str]:
    """The head's weights in transformers' class for a task type of PEFT; empty if there is no such class."""
    if task not in _CLASSES or type(config) not in _CLASSES[task]:
        return []
    model_class: Any = _CLASSES[task][type(config)]
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    with torch.device("meta"):
        model = model_class(small)
    inner = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not name.startswith(inner)]
