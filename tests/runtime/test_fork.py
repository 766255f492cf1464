"""Rows that go on from others, in every kind of cache: as if they had been given the other's tokens themselves."""

from __future__ import annotations

import numpy as np
import pytest

import prefix_runtime
from prefix_runtime import Bundle, RequestError
from prefix_runtime.backends.gpu.prefix_store import PrefixStore
from prefix_runtime.backends.onnxruntime.backend import OnnxRuntime
from prefix_runtime.backends.onnxruntime.cuda_cache import CudaCache
from prefix_runtime.backends.onnxruntime.session import Session
from prefix_runtime.bundle.tasks import TaskStore
from prefix_runtime.cache.cache import Cache
from prefix_runtime.engine import Engine
from prefix_runtime.prefix.cache_format import CacheFormat
from tests.runtime.host_device import HostDevice

KINDS = {"shared": {}, "appending": {"target": "portable"}, "baked": {"mode": "bake"}, "device": {"target": "cuda"}}
ROWS, CAPACITY = 4, 64
PROMPT = [5, 6, 7, 8]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def opened(workshop, kind):
    return Bundle.open(workshop.bundle(**KINDS[kind]))


@pytest.fixture
def device():
    return HostDevice()


@pytest.fixture
def backend(opened, kind, device):
    return OnnxRuntime(opened, Session(opened.graph_path, threads=1, device=device if kind == "device" else None))


@pytest.fixture
def prefixes(opened):
    store = TaskStore(opened)
    return {task: store.get(task) for task in ("p3", "p20")}


@pytest.fixture
def new_cache(backend, opened):
    """A cache whose rows hold these tasks' prefixes."""
    store = TaskStore(opened)

    def make(*tasks):
        task_id = store.place if opened.manifest.mode == "bake" else None
        cache = backend.make_cache(ROWS, CAPACITY, task_id)
        for row, task in enumerate(tasks):
            cache.seed(row, store.get(task))
        return cache

    return make


def steps_of(cache, *tokens):
    return [cache.step(list(each)).copy() for each in tokens]


def test_a_row_goes_on_from_the_prompt_of_another(new_cache):
    cache, alone = new_cache(*["p20"] * 3), new_cache(*["p20"] * 3)
    start = cache.rows[0].length
    cache.prefill(0, PROMPT)
    for row in (1, 2):
        cache.fork(0, row, start)
    for row in range(3):
        alone.prefill(row, PROMPT)
    tokens = [(1, 2, 3), (4, 4, 4), (9, 8, 7)]
    np.testing.assert_array_equal(steps_of(cache, *tokens), steps_of(alone, *tokens))
    assert [row.length for row in cache.rows[:3]] == [start + len(PROMPT) + 3] * 3


def test_a_row_goes_on_from_where_another_is(new_cache):
    """Row 0 follows row 1 from the first new token, then row 2 follows row 0 from the third one."""
    cache, alone = new_cache(*["p3"] * 3), new_cache(*["p3"] * 3)
    for each in (cache, alone):
        for row in range(3):
            each.prefill(row, PROMPT)
    start = cache.rows[0].length
    steps_of(cache, (1, 2, 2), (3, 4, 4))
    cache.fork(1, 0, start)
    steps_of(cache, (5, 6, 9))
    cache.fork(0, 2, start + 2)
    steps_of(alone, (2, 2, 2), (4, 4, 4), (5, 6, 5))
    tokens = [(11, 12, 13), (14, 15, 16)]
    np.testing.assert_array_equal(steps_of(cache, *tokens), steps_of(alone, *tokens))


def test_a_row_of_another_length_and_prefix_is_followed_from_the_beginning(new_cache, prefixes):
    cache, alone = new_cache("p20", "p3", "p3"), new_cache("p20", "p20", "p3")
    for each, prompts in ((cache, (PROMPT, [9], [3])), (alone, (PROMPT, PROMPT, [3]))):
        for row, prompt in enumerate(prompts):
            each.prefill(row, prompt)
    steps_of(cache, (1, 2, 3))
    cache.fork(0, 1, 0)
    steps_of(alone, (1, 1, 3))
    tokens = [(11, 12, 13), (14, 15, 16)]
    # Rows that are padded to another length are summed in another order.
    np.testing.assert_allclose(steps_of(cache, *tokens), steps_of(alone, *tokens), rtol=0, atol=2e-5)
    assert np.array_equal(cache.rows[1].prefix.sites["decoder"][0].key, prefixes["p20"].sites["decoder"][0].key)
    assert cache.rows[1].length == cache.rows[0].length


def test_a_row_that_left_is_followed_by_none(new_cache):
    """A row behind those that run is forked and moved like the others."""
    cache, alone = new_cache(*["p3"] * 4), new_cache(*["p3"] * 4)
    for each in (cache, alone):
        for row in range(4):
            each.prefill(row, [PROMPT[row]])
    steps_of(cache, (1, 2, 3, 4))
    cache.fork(3, 1, 0)
    cache.move(2, 0)
    steps_of(alone, (1, 2, 3, 4))
    alone.move(2, 0)
    alone.move(3, 1)
    tokens = [(11, 12), (14, 15)]
    np.testing.assert_allclose(steps_of(cache, *tokens), steps_of(alone, *tokens), rtol=0, atol=2e-5)


def test_the_next_request_finds_nothing_of_it(new_cache):
    cache, fresh = new_cache(*["p3"] * 2), new_cache(*["p3"] * 2)
    cache.prefill(0, PROMPT)
    cache.fork(0, 1, 3)
    steps_of(cache, (1, 2))
    for row in range(2):
        cache.reset(row)
    for each in (cache, fresh):
        each.prefill(0, [9, 9])
        each.prefill(1, [8])
    np.testing.assert_array_equal(steps_of(cache, (5, 6)), steps_of(fresh, (5, 6)))


def test_a_cache_that_cannot_copy_rows_says_so():
    class Plain(Cache):
        seed = reset = move = prefill = step = None

    Plain.__abstractmethods__ = frozenset()
    with pytest.raises(RequestError, match=r"^num_beams: expected 1, found more: Plain cannot copy rows$"):
        Plain(2, 8, 0).fork(0, 1, 0)


class TestDevice:
    """A device that lies in the host's memory."""

    @pytest.fixture
    def opened(self, workshop):
        return Bundle.open(workshop.bundle(target="cuda"))

    def test_a_fork_in_a_step_uploads_tokens_alone(self, opened, device, prefixes):
        geometry, half = opened.manifest.geometry, CacheFormat(np.dtype(np.float16))
        store = PrefixStore(device, geometry, half, 1 << 30)
        session = Session(opened.graph_path, threads=1, device=device)
        cache = CudaCache(session, geometry, 2, CAPACITY, cache_format=half, prefixes=store)
        for row in range(2):
            cache.seed(row, prefixes["p3"])
            cache.prefill(row, PROMPT)
        cache.step([1, 2])
        cache.step([3, 4])
        before = device.stream.copied.copy()
        cache.fork(0, 1, cache.rows[0].length - 1)
        copied = device.stream.copied - before
        assert copied == {"copy": half.dtype.itemsize * geometry.values_per_position}
        cache.step([5, 6])
        assert (device.stream.copied - before)["upload"] == 2 * np.dtype(np.int64).itemsize

    def test_beams_are_those_of_the_host(self, opened, device):
        plain = prefix_runtime.load(opened.root, threads=1)
        session = Session(opened.graph_path, threads=1, device=device)
        engine = Engine(opened, OnnxRuntime(opened, session), opened.manifest.max_length)
        options = {"task": ["p3", None, "p20"], "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": [9, 4, 14]}
        prompts = [[5, 6, 7], [8], [11, 12, 13, 14]]
        found, expected = (each.generate(token_ids=prompts, **options) for each in (engine, plain))
        assert [result.sequences for result in found] == [result.sequences for result in expected]
        assert engine.score([5, 6], [7, 8, 9], "p20") == plain.score([5, 6], [7, 8, 9], "p20")
