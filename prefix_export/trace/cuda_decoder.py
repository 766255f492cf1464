"""What is traced for a GPU: decode steps whose outputs are the next step's inputs.

A decode step of a small model takes as long as its kernels take to start, so what counts is their number. Modules
stand in for the model's own that emit what one kernel computes; `fuse.py` does the rest in the graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from prefix_runtime.bundle.graph_contract import NEXT_INPUTS

from .decoder import FastDecoder, Pairs
from .stand_ins import few_kernels, stand_ins


class CudaDecoder(FastDecoder):
    """A model whose greedy decode steps need nothing from outside; see `FastDecoder` for the arguments.

    Nodes on sizes alone come of `Shape`, so that onnxruntime leaves them on the CPU; all others have CUDA kernels and
    nothing is copied between the two, which `enable_cuda_graph` needs.
    """

    @property
    def outputs(self) -> list[str]:
        """See `Decoder`."""
        return [*super().outputs, *NEXT_INPUTS]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Pairs,
        *,
        num_logits_to_keep: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """The graph's outputs."""
        outputs = super().forward(input_ids, attention_mask, position_ids, past, num_logits_to_keep=num_logits_to_keep)
        batch = input_ids.shape[0]
        # The lowest of several that are largest, as numpy's argmax gives.
        best = _emitted("ArgMax", (outputs[0],), torch.int64, outputs[0].shape[:2], axis=-1, keepdims=0)
        token = _last(best, batch)
        position = _last(position_ids, batch) + 1
        # Ones, then zeros: one more of the first kind.
        mask = torch.cat((attention_mask[:, :1], attention_mask[:, :-1]), 1)
        return (*outputs, token, position, mask)

    def stand_ins(self) -> AbstractContextManager[None]:
        """See `Decoder`."""
        table = getattr(self.model.get_input_embeddings(), "weight", None)  # a rounded one has none
        return stand_ins(self.model, lambda module: few_kernels(module, table))

    def _kept(self, count: torch.Tensor, input_ids: torch.Tensor) -> slice:
        """See `Decoder`: a slice, which one kernel takes."""
        size = _emitted("Shape", (input_ids,), torch.int64, (1,), start=1, end=2)
        # All begin at 0, the last n at size - n; each operation takes a size, so that it stays on the CPU.
        first = torch.remainder(size - count, size).item()
        sequence = input_ids.shape[1]
        torch._check(first >= 0)  # noqa: SLF001  # torch documents it for torch.export
        torch._check(first < sequence)  # noqa: SLF001
        return slice(first, None)


def _last(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """[batch, sequence] to [batch, 1]."""
    return _emitted("Gather", (tensor, torch.tensor([-1])), tensor.dtype, (batch, 1), axis=1)


def _emitted(
    operator: str,
    inputs: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    shape: tuple[Any, ...] | torch.Size,
    **attributes: Any,
) -> torch.Tensor:
    """A tensor that an operator of the graph makes, of which the trace knows type and shape alone."""
    output: torch.Tensor = torch.onnx.ops.symbolic(
        operator, inputs, attrs=attributes, dtype=dtype, shape=tuple(shape), version=1 if "::" in operator else None
    )
    return output
