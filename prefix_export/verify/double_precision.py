"""A model computed in double precision, without a copy of its weights in double precision.

transformers rounds to float32 at norms, softmax and rotary positions, also in a model that was cast to float64. Here
every operation takes and gives float64, whatever type the model's code asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
# They move numbers and compute none: the table of embeddings need not be widened to look some rows up.
_LOOKUPS = frozenset({torch.ops.aten.embedding.default, torch.ops.aten.index_select.default})


class DoublePrecision(TorchDispatchMode):
    """Runs each operation in float64 while it is active; a weight is widened for the operation that reads it.

    So a model needs the memory of its weights as they are, and twice the bytes of its largest float32 weight.

    Source: `torch.utils._python_dispatch.TorchDispatchMode`, torch 2.13.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The operation's result, its floating point numbers in float64."""
        if func in _LOOKUPS:
            return tree_map(_widened, func(*args, **(kwargs or {})))
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))


def _widened(value: Any) -> Any:
    """A tensor of floating point, or the name of such a type, as float64; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype in _NARROW:
        return value.to(torch.float64)
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
