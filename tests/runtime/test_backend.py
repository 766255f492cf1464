"""A backend is one class: numpy runs a bundle's graph here, under a provider's name that this file registers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

import prefix_runtime
from prefix_runtime.backends import registry
from prefix_runtime.bundle import graph_contract as contract
from prefix_runtime.cache.cache import Cache


class NumpyCache(Cache):
    """Each row's keys and values, [1, num_key_value_heads, length, head_dim]; rows run one by one."""

    def __init__(self, graph, layers, rows, capacity):
        super().__init__(rows, capacity, nbytes=8 * rows * capacity * sum(layer.head_dim for layer in layers))
        self._graph, self._layers, self._past = graph, layers, [[] for _ in range(rows)]

    def seed(self, row, prefix):
        self.rows[row].prefix = prefix
        self.reset(row)

    def reset(self, row):
        prefix = self.rows[row].prefix
        empty = [(np.zeros((layer.key_value_heads, 0, layer.head_dim), np.float32),) * 2 for layer in self._layers]
        layers = empty if prefix is None else [(layer.key, layer.value) for layer in prefix.sites["decoder"]]
        self._past[row] = [array[None] for pair in layers for array in pair]
        self.rows[row].begin()

    def move(self, source, target):
        left, right = self.rows[source], self.rows[target]
        right.prefix, right.length, right.offset = left.prefix, left.length, left.offset
        self._past[target] = self._past[source]

    def prefill(self, row, token_ids, keep_all_logits=False):
        held, count = self.rows[row], len(token_ids)
        self._check_room(held, count)
        names = [name for pair in contract.tensor_names(contract.PAST, len(self._layers)) for name in pair]
        inputs = dict(zip(names, self._past[row], strict=True)) | {
            contract.INPUT_IDS: np.array([token_ids], np.int64),
            contract.ATTENTION_MASK: np.ones((1, held.length + count), np.int64),
            contract.POSITION_IDS: held.position + np.arange(count, dtype=np.int64)[None],
            contract.NUM_LOGITS_TO_KEEP: np.array(0 if keep_all_logits else 1, np.int64),
        }
        logits, *self._past[row] = self._graph.run(None, inputs)
        held.length += count
        return logits[0] if keep_all_logits else logits[0, -1]

    def step(self, token_ids):
        return np.stack([self.prefill(row, [token_id]) for row, token_id in enumerate(token_ids)])


class NumpyBackend(registry.Backend):
    """A bundle of the portable flavour, run by onnx' reference implementation."""

    def __init__(self, bundle):
        self._graph, self._layers = ReferenceEvaluator(str(bundle.graph_path)), bundle.manifest.geometry.layers

    @classmethod
    def open(cls, bundle, _request):
        return cls(bundle)

    def make_cache(self, rows, capacity, **_):
        return NumpyCache(self._graph, self._layers, rows, capacity)


@pytest.fixture
def bundle(workshop, monkeypatch):
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    registry.register("numpy", NumpyBackend)
    return workshop.bundle(target="portable")


def test_it_generates_what_onnxruntime_does(bundle):
    engines = [prefix_runtime.load(bundle, provider=provider) for provider in ("numpy", "cpu")]
    tasks = [None, *engines[0].tasks, None]
    ids = [[5, 6, 7], *([9 + index] for index in range(len(tasks) - 1))]
    ours, theirs = (engine.generate(token_ids=ids, task=tasks, max_new_tokens=9) for engine in engines)
    assert [result.token_ids for result in ours] == [result.token_ids for result in theirs]
    ours, theirs = (engine.logits([5, 6, 7], tasks[1]) for engine in engines)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_its_name_is_listed_and_cannot_be_taken_twice(bundle):
    with pytest.raises(prefix_runtime.ProviderError, match=r"expected one of cpu, .*, numpy, found 'abacus'"):
        prefix_runtime.load(bundle, provider="abacus")
    with pytest.raises(prefix_runtime.ProviderError, match="a name that is not taken, found 'numpy'"):
        registry.register("numpy", NumpyBackend)
