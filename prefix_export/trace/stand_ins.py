"""Modules that stand in for a model's own while it is traced, and compute the same in fewer nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D


@contextmanager
def stand_ins(model: PreTrainedModel, stand_in: Callable[[torch.nn.Module], torch.nn.Module | None]) -> Iterator[None]:
    """Put other modules in the place of a model's for a while; `stand_in` gives each one's, or None for it to stay."""
    others = {name: (module, stand_in(module)) for name, module in model.named_modules()}
    try:
        for name, (_, other) in others.items():
            if other is not None:
                model.set_submodule(name, other)
        yield
    finally:
        for name, (module, other) in others.items():
            if other is not None:
                model.set_submodule(name, module)


def plain_projection(module: torch.nn.Module) -> torch.nn.Module | None:
    """For `Conv1D` (GPT-2's linear layer) a `MatMul` and an `Add`."""
    return _Projection(module) if isinstance(module, Conv1D) else None


def few_kernels(module: torch.nn.Module, table: torch.Tensor | None) -> torch.nn.Module | None:
    """For linear layers and activations what makes no reshapes and `fuse.py` knows; `table` is the embedding's."""
    if isinstance(module, NewGELUActivation | FastGELUActivation):
        return torch.nn.GELU(approximate="tanh")
    if type(module) is not torch.nn.Linear:
        return plain_projection(module)
    return _TiedLinear(module) if module.weight is table else _Linear(module)


class _Projection(torch.nn.Module):
    """What transformers' `Conv1D` computes, without the reshapes that it puts around."""

    def __init__(self, original: Conv1D | torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        output = activation @ self.weight
        return output if self.bias is None else output + self.bias


class _Linear(_Projection):
    """The same for a linear layer, whose weight [outputs, inputs] comes to lie as [inputs, outputs].

    So onnxruntime's own CUDA kernels for a few rows want it (1.31, `ep.cuda.enable_gemm_auto_tune`). The original sees
    the same weight, in the same memory.
    """

    def __init__(self, original: torch.nn.Linear) -> None:
        super().__init__(original)
        weight = original.weight.data.t().contiguous()
        original.weight.data = weight.t()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


class _TiedLinear(torch.nn.Module):
    """A product with the table of embeddings as it lies there, [outputs, inputs].

    Emits `com.microsoft::FusedMatMul` (onnxruntime 1.32, docs/ContribOperators.md) and an `Add`.
    """

    def __init__(self, original: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        output: torch.Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::FusedMatMul",
            (activation, self.weight),
            attrs={"transB": 1},
            dtype=activation.dtype,
            shape=(*activation.shape[:-1], self.weight.shape[0]),
            version=1,
        )
        return output if self.bias is None else output + self.bias
