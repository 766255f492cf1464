"""Interrupted at any moment: no lock stays held, no buffer stays lent, and the next answer is right."""

from __future__ import annotations

import gc
import weakref
from typing import ClassVar

import numpy as np
import pytest

import prefix_runtime
from prefix_runtime.backends.onnxruntime import huge_pages
from prefix_runtime.bundle.tasks import TaskStore
from prefix_runtime.cache.cache import Cache
from prefix_runtime.cache.pool import CachePool
from tests.interruption import Interrupted, interrupted

IDS = [5, 6, 7]


class SmallCache(Cache):
    """A cache that holds nothing but what its rows are said to hold."""

    made: ClassVar = weakref.WeakSet()

    def __init__(self, rows, capacity):
        super().__init__(rows, capacity, rows * capacity)
        SmallCache.made.add(self)

    def seed(self, row, prefix):
        self.rows[row].prefix = prefix

    def reset(self, row):
        self.rows[row].length = 0

    def move(self, source, target):
        self.rows[target].prefix = self.rows[source].prefix

    def prefill(self, *_):
        return np.zeros(1)

    def step(self, token_ids):
        return np.zeros((len(token_ids), 1))


@pytest.fixture
def prefixes(make_prefix):
    return [make_prefix(3, seed=seed) for seed in range(3)]


@pytest.fixture
def collect():
    """Collects what is garbage, of what was made since."""
    gc.collect()
    gc.freeze()
    yield gc.collect
    gc.unfreeze()


def lease(pool, prefix):
    with pool.lease([prefix], 40) as (cache, _):
        assert cache.rows[0].prefix is prefix
        cache.step([1])


def streams(pool, prefix, *, ends):
    def stream():
        with pool.lease([prefix], 40) as (cache, _):
            yield cache.step([1])
            yield cache.step([1])

    one, other = stream(), stream()
    next(one), next(other)
    if ends:
        list(one)
    else:
        one.close()
    del other


WORK = {
    "a request": lambda pool, prefixes: lease(pool, prefixes[0]),
    "a request that finds no cache": lambda pool, prefixes: lease(pool, prefixes[2]),
    "streams that end": lambda pool, prefixes: streams(pool, prefixes[0], ends=True),
    "streams that are left": lambda pool, prefixes: streams(pool, prefixes[0], ends=False),
    "a task is forgotten": lambda pool, prefixes: pool.forget(prefixes[0]),
}


@pytest.mark.parametrize("work", WORK)
def test_a_pool_that_is_interrupted_at_any_moment_loses_nothing(prefixes, work, collect):
    moment = 0
    while True:
        moment += 1
        pool = CachePool(SmallCache, 1, 320, budget=150)  # of two caches
        for prefix in prefixes[:2]:
            lease(pool, prefix)
        moments = interrupted(lambda pool=pool: WORK[work](pool, prefixes), moment)
        assert not pool._lock.locked(), moment
        assert pool.lent_bytes == 0, moment
        collect()  # errors whose tracebacks know them
        alive = [cache for cache in SmallCache.made if cache not in pool._idle]
        assert alive == [], moment
        assert sum(cache.nbytes for cache in pool._idle) <= 150
        for prefix in prefixes:
            lease(pool, prefix)
        if moments < moment:
            break
    assert moment > 10, "what is not interrupted shows nothing"


@pytest.mark.parametrize("work", ["get", "compose", "add", "remove"])
def test_a_task_store_that_is_interrupted_at_any_moment_is_as_before_or_after(shared_bundle, prefixes, work):
    bundle, moment = prefix_runtime.Bundle.open(shared_bundle), 0
    one, two, _ = prefixes
    while True:
        moment += 1
        store = TaskStore(bundle)
        store.add("a", one)
        store.get("a+p3")
        does = {
            "get": lambda store=store: store.get("p20"),
            "compose": lambda store=store: store.get("p3+a"),
            "add": lambda store=store: store.add("b", two),
            "remove": lambda store=store: store.remove("a"),
        }[work]
        moments = interrupted(does, moment)
        assert not store._lock.locked(), moment
        assert set(store.names) - {"a", "b"} == {"p20", "p3"}
        if "a" in store.names:
            store.remove("a")
        if "b" in store.names:
            assert store.get("b") is two
        store.add("a", two)
        assert store.get("a+p3") == store.get("a+p3")
        assert all(store.holds(name, store.get(name)) for name in ("a", "p3", "p20", "a+p3", "p3+a"))
        np.testing.assert_array_equal(
            store.get("a+p3").sites["decoder"][0].key[:, :3], two.sites["decoder"][0].key, strict=True
        )
        if moments < moment:
            break
    assert moment > 10


def check_tensorrt_engine(engine, expected):
    assert not engine._pool._lock.locked()
    assert not engine._store._lock.locked()
    assert engine._pool.lent_bytes == 0
    found = {task: engine.generate(token_ids=IDS, task=task, max_new_tokens=3).token_ids for task in expected}
    assert found == expected


@pytest.mark.parametrize("work", ["generate", "stream", "add and remove"])
def test_an_engine_that_is_interrupted_answers_the_next_request_right(shared_bundle, make_prefix, work):
    engine = prefix_runtime.load(shared_bundle, threads=1)
    expected = {
        task: engine.generate(token_ids=IDS, task=task, max_new_tokens=3).token_ids for task in (None, "p3", "p20")
    }
    prefix = make_prefix(4)

    def add_and_remove():
        engine.add_task("new", prefix)
        engine.generate(token_ids=IDS, task="new+p3", max_new_tokens=1)
        engine.remove_task("new")

    does = {
        "generate": lambda: engine.generate(token_ids=[IDS] * 2, task=["p3", None], max_new_tokens=3),
        "stream": lambda: [next(engine.stream(token_ids=IDS, task="p20", max_new_tokens=5)) for _ in range(2)],
        "add and remove": add_and_remove,
    }[work]
    moments = interrupted(does, 0)
    for moment in range(1, moments, moments // 15):  # as many as take a second; `make test-stress` tries more
        interrupted(does, moment)
        if "new" in engine.tasks:
            engine.remove_task("new")
        check_tensorrt_engine(engine, expected)


def test_an_opening_that_is_interrupted_leaves_no_lock(shared_bundle):
    moments = interrupted(lambda: prefix_runtime.load(shared_bundle, threads=1), 0)
    for moment in range(1, moments, moments // 6):
        interrupted(lambda: prefix_runtime.load(shared_bundle, threads=1), moment)
    assert prefix_runtime.load(shared_bundle, threads=1).generate(token_ids=IDS, max_new_tokens=1).token_ids


@pytest.mark.parametrize("removed", [False, True])
def test_a_stream_is_collected_in_a_thread_that_holds_any_lock(shared_bundle, make_prefix, no_hang, removed):
    engine = prefix_runtime.load(shared_bundle, threads=1)
    prefix = make_prefix(4)
    engine.add_task("new", prefix)
    stream = engine.stream(token_ids=IDS, task="new", max_new_tokens=5)
    next(stream)
    if removed:
        engine.remove_task("new")
    with no_hang, engine._pool._lock, engine._store._lock:
        del stream
    assert engine._pool.lent_bytes == 0
    assert len(engine._pool._idle) == (0 if removed else 1)


def test_the_interruption_reaches_what_it_should():
    def work():
        pool = CachePool(SmallCache, 1, 320, 0)
        try:
            lease(pool, None)
        except Interrupted:
            caught.append(True)
            raise

    caught = []
    assert interrupted(work, 5) == 5
    assert caught == [True]


def test_openings_that_are_interrupted_at_any_moment_are_not_counted_for_ever(collect):
    def work():
        with huge_pages.opening():
            pass

    moment = moments = 0
    while moments == moment:  # as long as there was one more to be interrupted at
        moment += 1
        moments = interrupted(work, moment)
        collect()
        assert not huge_pages._openings.lock.locked()
        assert huge_pages._openings.under_way == set()
    assert moment > 5


COLLECTED_ON_A_GPU = """
import sys, threading, types

class Kinds:
    def __getattr__(self, name):
        return 0

freed = []
runtime = types.ModuleType("cuda.bindings.runtime")
runtime.__getattr__ = lambda name: Kinds()
for name in ("GetDevice", "SetDevice", "GetDeviceCount", "EventRecord", "StreamWaitEvent", "StreamCreateWithFlags",
             "EventCreateWithFlags", "ThreadExchangeStreamCaptureMode", "MemPoolSetAttribute", "MemPoolCreate",
             "MallocFromPoolAsync", "EventDestroy", "MemPoolDestroy"):
    setattr(runtime, f"cuda{name}", lambda *_, found=1 if name == "GetDeviceCount" else 0: (0, found))
runtime.cudaGetDeviceProperties = lambda _: (0, types.SimpleNamespace(name=b"a GPU"))
runtime.cudaMemPoolProps = lambda: types.SimpleNamespace(location=types.SimpleNamespace())
runtime.cudaStream_t = int
runtime.cudaFreeAsync = lambda *_: freed.append(1)
driver = types.ModuleType("cuda.bindings.driver")
driver.cuuint64_t = int
bindings = types.ModuleType("cuda.bindings")
bindings.runtime, bindings.driver = runtime, driver
sys.modules |= {"cuda": types.ModuleType("cuda"), "cuda.bindings": bindings, "cuda.bindings.runtime": runtime,
                "cuda.bindings.driver": driver}

from prefix_runtime.backends.gpu.device import Device
from prefix_runtime.backends.options import Cuda

device = Device(Cuda(stream=7))
memory, last = device.allocate(10), device.allocate(10)
held, over = threading.Event(), threading.Event()

def hold():
    with device.turn():
        held.set()
        over.wait(60)

other = threading.Thread(target=hold)
other.start()
held.wait()
del memory  # while another thread has its turn
print(over.is_set() or len(freed), end=" ")
over.set()
other.join()
with device.turn():
    print(len(freed), end=" ")
del last, device
print(len(freed))
"""


def test_memory_of_a_gpu_is_collected_without_waiting_for_a_turn_and_freed_in_the_next(python, no_hang):
    """On a stand-in for CUDA's bindings: what is tested is who waits for whom."""
    with no_hang:
        run = python(COLLECTED_ON_A_GPU)
    assert (run.stdout, run.stderr) == ("0 1 2\n", "")
