"""The attention functions that a model is run and traced under.

transformers dispatches every attention layer of most models to a function that a caller may register
(`AttentionInterface`, transformers 5.23). Under such a function the untouched model tells its geometry (`probe`) and is
traced with the operator that the target runs (`GroupQueryAttention`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from prefix_export.errors import UnsupportedArchitectureError

AttentionFunction = Callable[..., torch.Tensor]
"""`function(module, query, key, value, **kwargs)`: query [batch, heads, sequence, head_dim], key and value
[batch, num_key_value_heads, sequence, head_dim], rotated where the model does, to [batch, sequence, heads, head_dim].
"""

_NAME = "prefix_export"
_KEY_SCALE = 12  # its place among the operator's inputs; the value's follows
_active: ContextVar[AttentionFunction] = ContextVar("attention function")
_layer_listener: ContextVar[Callable[[], None]] = ContextVar("layer listener")

# What models hand to an attention function and what changes nothing here: positions are in the keys already, the
# operator is causal by definition, and nothing is trained.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)
_WITH_EFFECT = frozenset({"scaling", "sliding_window", "softcap"})


@dataclass(frozen=True)
class AttentionLayer:
    """What one attention layer of a model looks like; the window is None where attention is not limited to one."""

    heads: int
    key_value_heads: int
    head_dim: int
    sliding_window: int | None


def _dispatch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None = None,  # noqa: ARG001  # some models hand it over by this name
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    # No mask function is registered under this name, so transformers makes no mask.
    output = _active.get()(module, query, key, value, **kwargs)
    if (listener := _layer_listener.get(None)) is not None:
        listener()
    return output, None


AttentionInterface.register(_NAME, _dispatch)


@contextmanager
def attention(model: PreTrainedModel, function: AttentionFunction) -> Iterator[None]:
    """Run a model's attention layers by a function of ours for a while.

    Raises:
        UnsupportedArchitectureError: the model does not go through transformers' attention interface.
    """
    before = model.config._attn_implementation  # noqa: SLF001  # there is no public way to ask
    token = _active.set(function)
    try:
        try:
            model.set_attn_implementation(_NAME)
        except (ValueError, ImportError, AttributeError) as error:
            raise _not_on_the_interface(model) from error
        yield
    finally:
        _active.reset(token)
        model.set_attn_implementation(before)


@contextmanager
def counting_layers(listener: Callable[[], None]) -> Iterator[None]:
    """Call a listener after each attention layer that is run or traced for a while: a trace shows its progress so."""
    token = _layer_listener.set(listener)
    try:
        yield
    finally:
        _layer_listener.reset(token)


def probe(model: PreTrainedModel) -> tuple[AttentionLayer, ...]:
    """The attention layers of a model, found by running it on one token; a model on PyTorch's meta device will do.

    Raises:
        UnsupportedArchitectureError: a layer is not plain self-attention or does not go through the interface.
    """
    # transformers' own test, which reads the architecture's source (5.23).
    if not model._can_set_attn_implementation():  # noqa: SLF001  # there is no public way to ask
        raise _not_on_the_interface(model)
    by_module: dict[int, AttentionLayer] = {}

    def record(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        _refuse_unknown(type(model).__name__, kwargs)
        index = getattr(module, "layer_idx", None)
        is_plain = key.shape == value.shape and getattr(module, "is_causal", True)
        if index is None or index in by_module or not is_plain:
            raise UnsupportedArchitectureError(
                f"{type(model).__name__}: expected one causal self-attention a layer, keys and values of one shape, "
                f"found a second or another kind in {type(module).__name__}; such models are not supported yet"
            )
        _, heads, sequence, head_dim = query.shape
        by_module[index] = AttentionLayer(heads, key.shape[1], key.shape[3], kwargs.get("sliding_window"))
        return query.new_zeros(query.shape[0], sequence, heads, head_dim)

    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), attention(model, record), _refusing_failures(model):
        model(input_ids=token, position_ids=token, use_cache=False)
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(by_module) != list(range(layers)):
        raise _not_on_the_interface(model)
    return tuple(by_module[index] for index in range(layers))


@contextmanager
def _refusing_failures(model: PreTrainedModel) -> Iterator[None]:
    """Name a model whose code fails under a foreign attention function, as latent attention does."""
    try:
        yield
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "meta" in reason.lower():
            raise  # it looks at numbers, which the meta device does not have
        raise UnsupportedArchitectureError(
            f"{type(model).__name__}: expected plain causal attention, found code that fails under another attention "
            f"function: {reason}"
        ) from error


@dataclass(frozen=True)
class _Layer:
    """What an `AttentionFunction` is given, with the layer's number and its scale."""

    index: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None
    softcap: float | None


class PastAttention(ABC):
    """An attention function over a past, which makes a present; every layer is run once.

    Args:
        past: for each layer key and value, [batch, num_key_value_heads, past, head_dim].

    Attributes:
        present: for each layer that was run key and value; of what shape, a flavour says.
    """

    def __init__(self, past: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._past = past
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See `AttentionFunction`; [batch, sequence, heads, head_dim]."""
        _refuse_unknown(type(module).__name__, kwargs)
        index = int(module.layer_idx)  # type: ignore[arg-type]  # torch types every attribute of a module as a tensor
        scale = scaling or query.shape[3] ** -0.5
        return self._attend(_Layer(index, query, key, value, scale, sliding_window, softcap))

    @abstractmethod
    def _attend(self, layer: _Layer) -> torch.Tensor:
        """A layer's attention, [batch, sequence, heads, head_dim], and its present."""


class GroupQueryAttention(PastAttention):
    """Attention over a past that lies in one buffer with the present: the operator that onnxruntime runs in place.

    Emits `com.microsoft::GroupQueryAttention` (onnxruntime 1.32, docs/ContribOperators.md). The present is shaped like
    the past.

    Args:
        past: see `PastAttention`; float32, float16 or int8.
        lengths: filled positions of each row less one, with the new tokens, [batch] int32.
        total: the longest row's, a scalar, int32.
        scales: for an int8 past, for each layer key's and value's, [1, num_key_value_heads, 1, head_dim] float32.
    """

    def __init__(
        self,
        past: list[tuple[torch.Tensor, torch.Tensor]],
        lengths: torch.Tensor,
        total: torch.Tensor,
        scales: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        super().__init__(past)
        self._lengths, self._total, self._scales = lengths, total, scales

    def _attend(self, layer: _Layer) -> torch.Tensor:
        past_key, past_value = self._past[layer.index]
        batch, heads, sequence, head_dim = layer.query.shape
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": layer.key.shape[1], "scale": layer.scale}
        if layer.window:
            attributes["local_window_size"] = layer.window
        if layer.softcap:
            attributes["softcap"] = layer.softcap
        inputs: list[torch.Tensor | None] = [
            _packed(layer.query),
            _packed(layer.key),
            _packed(layer.value),
            past_key,
            past_value,
            self._lengths,
            self._total,
        ]
        if self._scales is not None:
            attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
            inputs += [None] * (_KEY_SCALE - len(inputs)) + list(self._scales[layer.index])
        output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attrs=attributes,
            dtypes=(layer.query.dtype, past_key.dtype, past_value.dtype),
            shapes=((batch, sequence, heads * head_dim), past_key.shape, past_value.shape),
            version=1,
        )
        self.present[layer.index] = (present_key, present_value)
        return output.view(batch, sequence, heads, head_dim)


class PortableAttention(PastAttention):
    """Attention in standard operators, over a past that is returned longer, and over prefixes beside it.

    The scores over a prefix and over past and new tokens are computed apart and joined for one softmax; its parts weigh
    the values of each, and their sum is attention over all of them. Of the prefix nothing is copied, and the rows of a
    batch may share it. The present is [batch, num_key_value_heads, total, head_dim].

    Args:
        past: see `PastAttention`.
        seen: which of past and new tokens there are, [batch, total] bool; the others are padding.
        prefixes: for each layer key and value, [batch or 1, num_key_value_heads, prefix, head_dim], ending where the
            past begins; None where there are none.
        prefix_seen: which slots of the prefixes there are, [batch or 1, prefix] bool.
    """

    def __init__(
        self,
        past: list[tuple[torch.Tensor, torch.Tensor]],
        seen: torch.Tensor,
        prefixes: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        prefix_seen: torch.Tensor | None = None,
    ) -> None:
        super().__init__(past)
        self._seen, self._prefixes, self._prefix_seen = seen, prefixes, prefix_seen
        self._masks: dict[int | None, torch.Tensor] = {}  # by sliding window

    def _attend(self, layer: _Layer) -> torch.Tensor:
        index, query, key = layer.index, layer.query, layer.key
        past_key, past_value = self._past[index]
        self.present[index] = torch.cat((past_key, key), 2), torch.cat((past_value, layer.value), 2)
        sources = [self.present[index]] if self._prefixes is None else [self._prefixes[index], self.present[index]]
        batch, heads, sequence, head_dim = query.shape
        groups = heads // key.shape[1]
        # Heads that share a key are rows of one product: no key is repeated.
        rows = (query * layer.scale).reshape(batch, key.shape[1], groups * sequence, head_dim)
        scores = torch.cat([rows @ keys.transpose(2, 3) for keys, _ in sources], 3).float()
        if layer.softcap:
            scores = torch.tanh(scores / layer.softcap) * layer.softcap
        scores = scores.reshape(batch, key.shape[1] * groups, sequence, -1)
        # A finite number: a row of padding, which sees nothing, shall be garbage and not NaN.
        scores = scores.masked_fill(~self._mask(sequence, layer.window), torch.finfo(torch.float32).min)
        weights = scores.softmax(3).to(query.dtype).reshape(batch, key.shape[1], groups * sequence, -1)
        output = _weighted(weights, [values for _, values in sources])
        return output.reshape(batch, heads, sequence, head_dim).transpose(1, 2)

    def _mask(self, sequence: int, window: int | None) -> torch.Tensor:
        """Which of prefix, past and new tokens each new token sees, [batch or 1, 1, sequence, all] bool."""
        if window not in self._masks:
            total = self._seen.shape[1]
            queries = torch.arange(total - sequence, total)[:, None]
            slots = torch.arange(total)
            seen = self._seen[:, None] & (slots <= queries)
            if window:
                seen = seen & (slots > queries - window)
            if self._prefixes is not None:
                seen = torch.cat((self._prefix_mask(sequence, window).expand(seen.shape[0], -1, -1), seen), 2)
            self._masks[window] = seen[:, None]
        return self._masks[window]

    def _prefix_mask(self, sequence: int, window: int | None) -> torch.Tensor:
        """Which slots of the prefixes each new token sees, [batch or 1, sequence, prefix] bool."""
        assert self._prefixes is not None
        length = self._prefixes[0][0].shape[2]
        slots = torch.arange(length) - length  # from the first token of text
        if window:
            # A row's own tokens count, padding does not: rows of a batch see what each would see alone.
            own = self._seen.to(torch.int64).cumsum(1)[:, self._seen.shape[1] - sequence :] - 1
            seen = slots > own[:, :, None] - window
        else:
            seen = (slots < 0).expand(1, sequence, length)
        return seen if self._prefix_seen is None else seen & self._prefix_seen[:, None]


def _weighted(weights: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of values [batch or 1, heads, length, head_dim], joined, by weights [batch, heads, rows, lengths]."""
    if len(values) == 1:
        return weights @ values[0]
    first, second = values
    length = first.shape[2]
    return weights[..., :length] @ first + weights[..., length:] @ second


def check_fast_flavour(model: PreTrainedModel, layers: tuple[AttentionLayer, ...]) -> None:
    """Refuse what `GroupQueryAttention` cannot run on a CPU.

    Raises:
        UnsupportedArchitectureError: a head size is no multiple of 8; build with --target portable.
    """
    for index, layer in enumerate(layers):
        if layer.head_dim % 8:
            raise UnsupportedArchitectureError(
                f"{type(model).__name__}: layer {index}: expected a head size that is a multiple of 8, which "
                f"onnxruntime's GroupQueryAttention needs, found {layer.head_dim}"
            )


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, heads, sequence, head_dim] to [batch, sequence, heads * head_dim]."""
    batch, heads, sequence, head_dim = tensor.shape
    return tensor.transpose(1, 2).reshape(batch, sequence, heads * head_dim)


def _refuse_unknown(where: str, kwargs: dict[str, Any]) -> None:
    unknown = sorted(
        name for name, value in kwargs.items() if value is not None and name not in _WITHOUT_EFFECT | _WITH_EFFECT
    )
    if unknown:
        raise UnsupportedArchitectureError(
            f"{where}: expected plain causal attention, found the arguments {', '.join(unknown)}; "
            "the attention function would have to compute them"
        )


def _not_on_the_interface(model: PreTrainedModel) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"{type(model).__name__}: expected every attention layer to go through transformers' AttentionInterface, found "
        "layers that compute attention themselves; the architecture needs an export path of its own, which this "
        "version does not have"
    )
