"""Mixtures of experts: find their weights, and run them in a form that torch.export can trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

_TRACEABLE = "batched_mm"
"""transformers' implementation that looks up the weights of each token's experts (5.23, integrations/moe.py)."""


def expert_weights(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The weights of a model's experts, [experts, outputs, inputs] or [experts, inputs, outputs] each."""
    for module in model.modules():
        # `use_experts_implementation` sets these attributes on modules with experts.
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            yield from (parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3)


@contextmanager
def traceable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, run a model's experts through an implementation that torch.export can trace."""
    if next(expert_weights(model), None) is None:
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation(_TRACEABLE)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def notes(model: PreTrainedModel, *, is_quantized: bool) -> Iterator[str]:
    """Notes for the user about a mixture of experts in a bundle, one line each; none for other models.

    Args:
        model: the model, in the type that it was loaded in.
        is_quantized: whether the bundle has weights in 8 or 4 bits.
    """
    weights = list(expert_weights(model))
    if not weights:
        return
    largest = max(weight[0].nbytes for weight in weights)
    yield (
        f"the graph copies the weights of each expert that a token of the prompt uses, {largest / 1e6:.1f} MB each, "
        "while a layer runs: long prompts take much memory"
    )
    if is_quantized:
        unquantized = sum(weight.nbytes for weight in weights)
        total = sum(weight.nbytes for weight in model.parameters())
        yield (
            f"the weights of the experts, {unquantized / 1e6:.1f} MB of {total / 1e6:.1f} MB in float32, are not "
            "quantized: only linear layers and the embedding are"
        )
