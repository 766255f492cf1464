"""What is traced: a frozen model with its past, and prefixes where the graph holds them, given from outside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel

from prefix_runtime import LayerPrefix
from prefix_runtime.bundle import graph_contract as contract

from .attention import AttentionLayer, GroupQueryAttention, PastAttention, PortableAttention, attention
from .prefix_bank import PrefixBank
from .stand_ins import plain_projection, stand_ins

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer."""


class Decoder(torch.nn.Module):
    """A model under an attention function of ours, which reads a past and makes a present.

    Args:
        model: that is traced.
        layers: its attention layers.
        dtype: of past and present.

    Attributes:
        model, layers: as given.
        names: of the inputs, in order.
    """

    _past_length: int
    """Of the example."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.layers, self._dtype = model, tuple(layers), dtype
        self.names = [*contract.TOKEN_INPUTS, *self.pairs(contract.PAST), contract.NUM_LOGITS_TO_KEEP]

    @property
    def outputs(self) -> list[str]:
        """The outputs' names, in order."""
        return [contract.LOGITS, *self.pairs(contract.PRESENT)]

    def stand_ins(self) -> AbstractContextManager[None]:
        """Put in place of the model's modules, for the trace, what computes the same in fewer nodes."""
        return stand_ins(self.model, plain_projection)

    def pairs(self, group: str) -> list[str]:
        """Names for each layer's keys and values."""
        return [name for pair in contract.tensor_names(group, len(self.layers)) for name in pair]

    def example(self) -> dict[str, Any]:
        """Arguments to trace with, of sizes that occur once each, so that the trace takes no two axes for one."""
        batch, sequence, past, buffer = 2, 3, 5, self._past_length
        return {
            contract.INPUT_IDS: torch.zeros(batch, sequence, dtype=torch.int64),
            contract.ATTENTION_MASK: torch.ones(batch, past + sequence, dtype=torch.int64),
            contract.POSITION_IDS: torch.arange(past, past + sequence).repeat(batch, 1),
            "past": self.zeros(batch, buffer),
            contract.NUM_LOGITS_TO_KEEP: torch.tensor(1),
        }

    def dynamic_shapes(self) -> dict[str, Any]:
        """The axes' names, which are part of the contract."""
        axes = {name: torch.export.Dim(name) for shape in contract.TOKEN_INPUTS.values() for name in shape}
        past = {0: axes[contract.BATCH], 2: torch.export.Dim(contract.PAST_SEQUENCE)}
        tokens = {
            name: {place: axes[axis] for place, axis in enumerate(shape)}
            for name, shape in contract.TOKEN_INPUTS.items()
        }
        return {**tokens, "past": [(past, past)] * len(self.layers), contract.NUM_LOGITS_TO_KEEP: {}}

    @property
    def held_bytes(self) -> int:
        """Of prefixes that the graph holds and reads in every step."""
        return 0

    def zeros(self, batch: int, length: int) -> Pairs:
        """Keys and values of each layer, [batch, num_key_value_heads, length, head_dim]."""

        def cached(layer: AttentionLayer) -> torch.Tensor:
            return torch.zeros(batch, layer.key_value_heads, length, layer.head_dim, dtype=self._dtype)

        return [(cached(layer), cached(layer)) for layer in self.layers]

    def _hold(self, name: str, pairs: Pairs) -> None:
        """Keep each layer's pair as constants of the graph."""
        for index, pair in enumerate(pairs):
            for part, tensor in zip(contract.PARTS, pair, strict=True):
                self.register_buffer(f"{name}_{index}_{part}", tensor)

    def _held(self, name: str) -> Pairs:
        """What `_hold` keeps."""
        key, value = (
            [self.get_buffer(f"{name}_{index}_{part}") for index in range(len(self.layers))] for part in contract.PARTS
        )
        return list(zip(key, value, strict=True))

    def _run(
        self,
        function: PastAttention,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        num_logits_to_keep: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """The logits, float32, and each layer's present keys and values."""
        with attention(self.model, function):
            output = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=self._kept(num_logits_to_keep, input_ids),
            )
        present = [tensor for index in range(len(self.layers)) for tensor in function.present[index]]
        return (output.logits.float(), *present)

    def _kept(self, count: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor | slice:
        """The positions whose logits are wanted: the last `count`, or all for 0."""
        sequence = input_ids.shape[1]
        first = torch.where(count == 0, 0, _size(input_ids, 1) - count).item()
        # The trace knows nothing of this number: what it may be has to be said.
        torch._check(first >= 0)  # noqa: SLF001  # torch documents it for torch.export
        torch._check(first <= sequence)  # noqa: SLF001
        return torch.arange(first, sequence)


class FastDecoder(Decoder):
    """A model whose past and present share one buffer; see `GroupQueryAttention`.

    Args:
        model, layers, dtype: see `Decoder`.
        scales: for an int8 past each layer's, [num_key_value_heads, 1, head_dim] float32.
    """

    _past_length = 11  # of a buffer, longer than what is filled

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[AttentionLayer],
        dtype: torch.dtype,
        scales: Sequence[LayerPrefix] | None = None,
    ) -> None:
        super().__init__(model, layers, dtype)
        self._has_scales = scales is not None
        if scales is not None:
            self._hold("scale", [(torch.tensor(layer.key)[None], torch.tensor(layer.value)[None]) for layer in scales])

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
        lengths = (attention_mask.sum(1) - 1).to(torch.int32)
        total = _size(attention_mask, 1).reshape(()).to(torch.int32)
        function = GroupQueryAttention(past, lengths, total, self._held("scale") if self._has_scales else None)
        return self._run(function, input_ids, position_ids, num_logits_to_keep)


class PortableDecoder(Decoder):
    """A model in standard operators, whose present is the past and what is new; see `PortableAttention`.

    Args:
        model, layers, dtype: see `Decoder`.
        bank: prefixes that the graph holds; with more than one a `task_id` for each row chooses. None for no such.
        takes_prefix: whether keys and values of a prefix and the position of the first token of text behind it are
            inputs, `prefix.{i}.key`, `.value` [1, num_key_value_heads, prefix_length, head_dim] and `position_base`
            [1] int64.
    """

    _past_length = 5

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[AttentionLayer],
        dtype: torch.dtype,
        bank: PrefixBank | None = None,
        *,
        takes_prefix: bool = False,
    ) -> None:
        super().__init__(model, layers, dtype)
        self._bank, self.takes_prefix = bank, takes_prefix
        if takes_prefix:
            self.names += [*self.pairs(contract.PREFIX), contract.POSITION_BASE]
        if bank is None:
            return
        tensors = [(torch.from_numpy(key).to(dtype), torch.from_numpy(value).to(dtype)) for key, value in bank.layers]
        self._hold("prefix", tensors)
        self.register_buffer("position_bases", torch.from_numpy(bank.position_bases))
        self.register_buffer("prefix_seen", torch.from_numpy(bank.seen))
        if self._is_choosing:
            self.names.append(contract.TASK_ID)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Pairs,
        *,
        num_logits_to_keep: torch.Tensor,
        task_id: torch.Tensor | None = None,
        prefixes: Pairs | None = None,
        position_base: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The graph's outputs."""
        total = past[0][0].shape[2] + input_ids.shape[1]
        seen = _as_bool(attention_mask, (input_ids.shape[0], total))
        prefix_seen = None
        if self._bank is not None:
            prefixes, prefix_seen, position_base = self._chosen(task_id)
        if position_base is not None:
            position_ids = position_ids + position_base[:, None]
        function = PortableAttention(past, seen, prefixes, prefix_seen)
        return self._run(function, input_ids, position_ids, num_logits_to_keep)

    def example(self) -> dict[str, Any]:
        """See `Decoder`."""
        example = super().example()
        if self._is_choosing:
            example[contract.TASK_ID] = torch.tensor([0, 1])
        if self.takes_prefix:
            example |= {"prefixes": self.zeros(1, 7), contract.POSITION_BASE: torch.tensor([7])}
        return example

    def dynamic_shapes(self) -> dict[str, Any]:
        """See `Decoder`."""
        shapes = super().dynamic_shapes()
        if self._is_choosing:
            shapes[contract.TASK_ID] = {0: shapes[contract.INPUT_IDS][0]}
        if self.takes_prefix:
            length = {2: torch.export.Dim("prefix_length")}
            shapes |= {"prefixes": [(length, length)] * len(self.layers), contract.POSITION_BASE: {}}
        return shapes

    @property
    def tasks(self) -> tuple[str, ...]:
        """Whose prefixes the graph holds; a task's place is its `task_id`."""
        return self._bank.tasks if self._bank is not None else ()

    @property
    def held_bytes(self) -> int:
        """See `Decoder`; one of several prefixes is looked up, as a row of a table is."""
        if self._bank is None or self._is_choosing:
            return 0
        return sum(array.size * self._dtype.itemsize for pair in self._bank.layers for array in pair)

    @property
    def _is_choosing(self) -> bool:
        return self._bank is not None and len(self._bank.tasks) > 1

    def _chosen(self, task_id: torch.Tensor | None) -> tuple[Pairs, torch.Tensor | None, torch.Tensor]:
        """The prefixes of the rows, which of their slots there are, and the positions of their first tokens."""
        assert self._bank is not None
        held, seen, bases = self._held("prefix"), self.get_buffer("prefix_seen"), self.get_buffer("position_bases")
        if task_id is None:
            return held, None, bases
        # onnxruntime refuses a place behind the last one, but counts a negative one from there.
        place = torch.where(task_id < 0, len(self._bank.tasks), task_id)
        chosen = [(key.index_select(0, place), value.index_select(0, place)) for key, value in held]
        return chosen, seen.index_select(0, place), bases.index_select(0, place)


def _size(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """An axis' size, [1] int64, of the graph: `tensor.shape[axis]` would be a number of the trace."""
    return torch.onnx.ops.symbolic(
        "Shape", (tensor,), attrs={"start": axis, "end": axis + 1}, dtype=torch.int64, shape=(1,), version=15
    )


def _as_bool(mask: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A mask as bool, of a shape that the trace cannot know to be the mask's: past and new tokens together."""
    seen: torch.Tensor = torch.onnx.ops.symbolic(
        "Cast", (mask,), attrs={"to": 9}, dtype=torch.bool, shape=shape, version=19
    )
    return seen
