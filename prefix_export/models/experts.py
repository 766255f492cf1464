"""Mixtures of experts: their weights, and an implementation of them that torch.export can trace."""

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
        # The mark of modules that run by an implementation of experts; `use_experts_implementation` sets it.
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            yield from (parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3)


@contextmanager
def traceable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Run a model's experts by an implementation that torch.export can trace, as long as the block lasts."""
    if next(expert_weights(model), None) is None:
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation(_TRACEABLE)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def unquantized_note(model: PreTrainedModel) -> str | None:
    """What the user should know of experts when weights are quantised: theirs are not; None without experts."""
    kept = sum(parameter.nbytes for parameter in expert_weights(model))
    if not kept:
        return None
    total = sum(parameter.nbytes for parameter in model.parameters())
    return (
        f"the weights of the experts, {kept / 1e6:.1f} MB of {total / 1e6:.1f} MB in float32, stay as they are: only "
        "linear layers and the embedding are quantized"
    )
