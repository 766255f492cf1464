"""How code bases that cannot be installed run a model with their prefix, in plain torch; and a model run with ours.

Theirs replaces what attention layers compute, as those code bases do in their copies of transformers; ours goes through
transformers' own interface for attention functions, or its own cache, from what a `Prefix` says alone.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import eager_mask

NAME = "prefixed"
ZERO, OWN = "zero", None
"""What a prefix adds to T5's scores: nothing, or what transformers' own past would."""


def cache_of(layers):
    """A cache of keys and values, each [1, heads, length, head_dim]."""
    cache = DynamicCache()
    for index, (key, value) in enumerate(layers):
        cache.update(key, value, index)
    return cache


def sites_of(model):
    """Each attention layer of an encoder-decoder, with its site and its place there."""
    inner = getattr(model, "model", model)  # of BART; T5 has its sides itself
    for side in ("encoder", "decoder"):
        stack = getattr(inner, side)
        for index, block in enumerate(stack.layers if hasattr(stack, "layers") else stack.block):
            if hasattr(block, "layer"):  # of T5
                yield block.layer[0].SelfAttention, side, index
                if side == "decoder":
                    yield block.layer[1].EncDecAttention, "cross", index
            else:
                yield block.self_attn, side, index
                if side == "decoder":
                    yield block.encoder_attn, "cross", index


def prefix_bias(model, site, queries, length):
    """T5's bias of text on a prefix before it, where both are counted, [1, heads, queries, length]."""
    first = next(module for module, where, index in sites_of(model) if (where, index) == (site, 0))
    return first.compute_bias(queries, length + queries, past_seen_tokens=length)[..., :length]


def _attend(query, key, value, scale, bias):
    weights = torch.softmax(query @ key.transpose(2, 3) * scale + bias, dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def _padded(bias, queries, keys, columns):
    """A mask or bias [1, heads, queries, text], or none, with columns of a prefix before it."""
    text = keys - columns.shape[-1]
    found = torch.zeros(1, 1, queries, text) if bias is None else bias[..., -queries:, -text:]
    return torch.cat([columns.expand(*found.shape[:2], -1, -1), found], -1)


def _bart(module, prefix):
    """BART's attention with a prefix' keys and values before the text's."""

    def forward(hidden_states, key_value_states=None, past_key_values=None, attention_mask=None, **_):
        assert past_key_values is None
        source = hidden_states if key_value_states is None else key_value_states
        split = (1, -1, module.num_heads, module.head_dim)
        query = module.q_proj(hidden_states).view(split).transpose(1, 2)
        key, value = (layer(source).view(split).transpose(1, 2) for layer in (module.k_proj, module.v_proj))
        key, value = (torch.cat(pair, 2) for pair in zip(prefix, (key, value), strict=True))
        seen = torch.zeros(1, 1, query.shape[2], prefix[0].shape[2])
        mask = _padded(attention_mask, query.shape[2], key.shape[2], seen)
        return module.out_proj(_attend(query, key, value, module.head_dim**-0.5, mask)), None

    return forward


def _t5(module, prefix, columns):
    """T5's attention with a prefix before the text's keys; `columns(queries)` is its bias there."""

    def forward(hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_values=None, **_):
        assert past_key_values is None
        source = hidden_states if key_value_states is None else key_value_states
        split = (1, -1, module.n_heads, module.key_value_proj_dim)
        query = module.q(hidden_states).view(split).transpose(1, 2)
        key, value = (layer(source).view(split).transpose(1, 2) for layer in (module.k, module.v))
        queries, keys = query.shape[2], key.shape[2]
        if position_bias is None and module.has_relative_attention_bias:
            position_bias = module.compute_bias(queries, keys)
        key, value = (torch.cat(pair, 2) for pair in zip(prefix, (key, value), strict=True))
        bias = _padded(position_bias, queries, key.shape[2], columns(queries))
        seen = torch.zeros(1, 1, queries, prefix[0].shape[2])
        bias = bias + _padded(mask, queries, key.shape[2], seen)
        return module.o(_attend(query, key, value, 1.0, bias)), position_bias, None

    return forward


@contextmanager
def theirs(model, past, bias=ZERO):
    """An encoder-decoder whose attention layers have prefixes: by site, a key and a value for each layer."""
    with ExitStack() as stack:
        for module, site, index in sites_of(model):
            if site not in past:
                continue
            pair = past[site][index]
            length = pair[0].shape[2]
            if hasattr(module, "n_heads"):

                def columns(queries, site=site, length=length):
                    is_zero = bias == ZERO or site == "cross"
                    return torch.zeros(1, 1, queries, length) if is_zero else prefix_bias(model, site, queries, length)

                forward = _t5(module, pair, columns)
            else:
                forward = _bart(module, pair)
            stack.enter_context(mock.patch.object(module, "forward", forward))
        yield


@contextmanager
def ours(model, prefix, sites):
    """An encoder-decoder with some sites of a `Prefix`, by transformers' interface for attention functions."""
    own = {module: (site, index) for module, site, index in sites_of(model)}
    bias = prefix.metadata.get("relative_position_bias")

    def attend(module, query, key, value, attention_mask, scaling, position_bias=None, **_):
        site, index = own[module]
        columns = torch.zeros(1, 1, query.shape[2], 0)
        shown = columns
        if site in sites:
            layer = prefix.sites[site][index]
            key = torch.cat([torch.tensor(layer.key)[None], key], 2)
            value = torch.cat([torch.tensor(layer.value)[None], value], 2)
            columns = shown = torch.zeros(1, 1, query.shape[2], prefix.prefix_length)
            if bias is None and position_bias is not None and site != "cross":
                shown = prefix_bias(model, site, query.shape[2], prefix.prefix_length)
        added = _padded(attention_mask, query.shape[2], key.shape[2], columns)
        if position_bias is not None:
            added = added + _padded(position_bias, query.shape[2], key.shape[2], shown)
        found = _attend(query, key, value, scaling, added)
        return found.unflatten(2, (query.shape[1], -1)), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("eager")


def decoded(model, source, tokens, decoder=None):
    """The logits [tokens, vocab] of an encoder-decoder; with a past of the decoder's own, which its text is behind."""
    options = {"use_cache": False}
    if decoder is not None:
        length = decoder[0][0].shape[2]
        mask = torch.ones(1, length + len(tokens), dtype=torch.int64)
        options = {
            "past_key_values": EncoderDecoderCache(cache_of(decoder), DynamicCache()),
            "decoder_attention_mask": mask,
            "use_cache": True,
        }
    with torch.no_grad():
        return model(input_ids=source, decoder_input_ids=torch.tensor([tokens]), **options).logits[0]


def greedy(logits, first, count):
    """The tokens that `logits(tokens)` is highest for, one after another, behind the first ones."""
    tokens = list(first)
    for _ in range(count):
        tokens.append(int(logits(tokens)[-1].argmax()))
    return tokens[len(first) :]
