"""Keys and values on a device: the same answers as on the host, and next to nothing copied between the two.

The device is in the host's memory (`host_device`), the graph is one for GPUs, run by onnxruntime's CPU kernels.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest

import prefix_runtime
from prefix_runtime import Bundle, ContextOverflowError, Cuda, Geometry, LayerGeometry, ProviderError, Sampling
from prefix_runtime.backends.gpu.buffer import DeviceBuffer
from prefix_runtime.backends.gpu.prefix_store import PrefixStore
from prefix_runtime.backends.onnxruntime.backend import OnnxRuntime
from prefix_runtime.backends.onnxruntime.cuda_cache import CudaCache, _Chosen
from prefix_runtime.backends.onnxruntime.session import Session
from prefix_runtime.backends.onnxruntime.shared_cache import SharedCache
from prefix_runtime.bench import bandwidth
from prefix_runtime.engine import Engine
from prefix_runtime.prefix.cache_format import CacheFormat
from tests.runtime.host_device import HostDevice

HALF = CacheFormat(np.dtype(np.float16))
CAPACITY, ROWS = 64, 5
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11], [12, 13, 14, 15, 16], [17, 18]]
LENGTHS = (4, 9, 0, 6, 5)


@pytest.fixture(scope="module")
def opened(workshop):
    return Bundle.open(workshop.bundle(target="cuda"))


@pytest.fixture(scope="module")
def geometry(opened):
    return opened.manifest.geometry


@pytest.fixture
def device():
    return HostDevice()


@pytest.fixture
def session(opened, device):
    return Session(opened.graph_path, threads=1, device=device)


@pytest.fixture
def resident(device, geometry):
    return PrefixStore(device, geometry, HALF, 1 << 30)


@pytest.fixture
def on_device(session, geometry, resident):
    return CudaCache(session, geometry, ROWS, CAPACITY, cache_format=HALF, prefixes=resident)


@pytest.fixture
def on_host(opened, geometry):
    return SharedCache(Session(opened.graph_path, threads=1), geometry, ROWS, CAPACITY, HALF)


@pytest.fixture
def prefixes(make_prefix):
    made = {length: make_prefix(length, seed=length, dtype=np.float16) for length in LENGTHS if length}
    return [made.get(length) for length in LENGTHS]


@pytest.fixture
def engine(opened, session):
    return Engine(opened, OnnxRuntime(opened, session), opened.manifest.max_length)


@pytest.fixture(scope="module")
def plain(opened):
    return prefix_runtime.load(opened.root, threads=1)


def failing(*_):
    raise ProviderError("no room")


def begun(cache, prefixes):
    """The first token of each row's answer to its prompt."""
    for row, prefix in enumerate(prefixes):
        cache.seed(row, prefix)
    return [int(cache.prefill(row, prompt).argmax()) for row, prompt in enumerate(PROMPTS)]


def answers(cache, prefixes):
    """All tokens of a batch whose rows leave, whose tokens are now and then chosen by the host, or are others."""
    tokens = begun(cache, prefixes)
    found = [tokens]
    for number in range(18):
        if number == 7:  # the second row leaves, and the last takes its place
            cache.move(4, 1)
            tokens = [tokens[0], tokens[4], tokens[2], tokens[3]]
        if number == 11:
            tokens = tokens[:2]
        if number in (4, 13):
            tokens = cache.step(tokens).argmax(1).tolist()
        elif number == 15:
            tokens = cache.choose([7] * len(tokens), more=9)
        else:
            tokens = cache.choose(tokens, more=17 - number)
        found.append(tokens)
    return found


def test_a_batch_answers_as_on_the_host(on_device, on_host, prefixes):
    expected = answers(on_host, prefixes)
    assert answers(on_device, prefixes) == expected
    assert answers(on_device, prefixes) == expected  # what the first time left changes nothing


def test_logits_are_those_of_the_host(on_device, on_host, prefixes):
    found, expected = (
        [begun(cache, prefixes), cache.step([1, 2, 3, 4, 5]).copy(), cache.prefill(2, [6, 7], keep_all_logits=True)]
        for cache in (on_device, on_host)
    )
    assert found[0] == expected[0]
    for left, right in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_greedy_step_copies_tokens_to_the_host_and_nothing_from_it(on_device, prefixes, device):
    tokens = on_device.choose(begun(on_device, prefixes), more=9)
    before = device.stream.copied.copy()
    for _ in range(5):
        tokens = on_device.choose(tokens, more=9)
    copied = device.stream.copied - before
    assert copied["upload"] == 0
    assert copied["download"] == 5 * ROWS * np.dtype(np.int64).itemsize


def test_a_sampled_step_copies_logits_one_way_and_tokens_the_other(on_device, prefixes, device, geometry):
    on_device.step(begun(on_device, prefixes))
    before = device.stream.copied.copy()
    on_device.step([1, 2, 3, 4, 5])
    copied = device.stream.copied - before
    assert copied["upload"] == ROWS * np.dtype(np.int64).itemsize
    assert copied["download"] == ROWS * (np.dtype(np.int64).itemsize + geometry.vocab_size * 4)


def test_the_last_step_is_not_followed_by_one_that_nobody_asked_for(on_device, prefixes, monkeypatch):
    runs = []
    tokens = begun(on_device, prefixes)
    launch = CudaCache._launch
    monkeypatch.setattr(CudaCache, "_launch", lambda cache: (runs.append(1), launch(cache)))
    for more, expected in ((2, 2), (1, 3), (0, 3)):  # one ahead of the host, until none may follow
        tokens = on_device.choose(tokens, more=more)
        assert len(runs) == expected


def test_the_next_step_is_asked_for_before_the_host_waits_for_this_one(on_device, prefixes, monkeypatch):
    happened = []
    tokens = begun(on_device, prefixes)
    launch, read = CudaCache._launch, _Chosen.read
    monkeypatch.setattr(CudaCache, "_launch", lambda cache: (happened.append("launch"), launch(cache)))
    monkeypatch.setattr(_Chosen, "read", lambda *args: (happened.append("read"), read(*args))[1])
    for _ in range(2):
        tokens = on_device.choose(tokens, more=9)
    assert happened == ["launch", "launch", "read", "launch", "read"]


def test_steps_are_bound_for_few_numbers_of_rows(on_device, prefixes):
    tokens = begun(on_device, prefixes)
    for count in (5, 4, 3, 2, 1):
        on_device.choose(tokens[:count], more=9)
    assert sorted(on_device._steps) == [1, 2, 4, 5]


def test_rows_that_have_left_are_run_along_from_an_empty_beginning(on_device, prefixes):
    tokens = begun(on_device, prefixes)
    on_device.choose(tokens[:3], more=0)
    assert [row.prefix is None and row.length == 0 for row in on_device.rows] == [False, False, False, True, False]


def test_what_was_captured_goes_with_the_buffers(session, geometry, resident, monkeypatch):
    released = []
    monkeypatch.setattr(session._session, "release_captured_graph", released.append)
    cache = CudaCache(session, geometry, 2, CAPACITY, cache_format=HALF, prefixes=resident)
    for row in range(2):
        cache.seed(row, None)
    cache.choose([1, 2], more=0)
    cache.choose([1], more=0)
    assert released == []
    del cache
    gc.collect()
    assert len(set(released)) == 2


def test_a_full_row_is_refused_before_anything_runs(session, geometry, resident):
    cache = CudaCache(session, geometry, 1, 4, cache_format=HALF, prefixes=resident)
    cache.seed(0, None)
    tokens = [int(cache.prefill(0, [1, 2, 3]).argmax())]
    tokens = cache.choose(tokens, more=9)
    with pytest.raises(ContextOverflowError, match=r"^expected at most 4 positions, found 5$"):
        cache.choose(tokens, more=9)
    with pytest.raises(ContextOverflowError):
        cache.step(tokens)
    with pytest.raises(ContextOverflowError):
        cache.prefill(0, [1])


def test_a_graph_of_another_target_is_refused(shared_bundle, device, geometry, resident):
    session = Session(Bundle.open(shared_bundle).graph_path, threads=1, device=device)
    with pytest.raises(ProviderError, match=r"^provider 'cuda': expected .* build the bundle with --target cuda$"):
        CudaCache(session, geometry, 1, 8, cache_format=HALF, prefixes=resident)


def test_layers_of_several_shapes_are_copied_each_as_it_is(device):
    geometry = Geometry({"decoder": (LayerGeometry(2, 8), LayerGeometry(1, 16), LayerGeometry(2, 8))}, 64, 10)
    source, target = (DeviceBuffer(device, geometry, 2, rows, length) for rows, length in ((1, 3), (2, 5)))
    assert source.nbytes == 3 * 2 * geometry.values_per_position
    wanted = {}
    for index, layer in enumerate(geometry.layers):
        for part in range(2):
            shape = (layer.key_value_heads, 3, layer.head_dim)
            wanted[index, part] = np.random.default_rng(2 * index + part).normal(size=shape).astype(np.float16)
            device.stream.upload(source.address(index, part), wanted[index, part])
    target.copy_row(1, source, 0, 3)
    for (index, part), expected in wanted.items():
        layer = geometry.layers[index]
        found = np.empty((layer.key_value_heads, 5, layer.head_dim), np.float16)
        device.stream.download(found, target.address(index, part, 1))
        np.testing.assert_array_equal(found[:, :3], expected)


def test_a_prefix_that_cannot_be_brought_in_leaves_nothing_behind(on_device, on_host, make_prefix, monkeypatch):
    other, lost = (make_prefix(8, seed=seed, position_base=0) for seed in range(2))
    on_device.seed(0, other)
    with monkeypatch.context() as patch:
        patch.setattr(PrefixStore, "get", failing)
        with pytest.raises(ProviderError):
            on_device.seed(0, lost)
    on_device.reset(0)  # as the pool does for a request without a prefix
    on_host.seed(0, None)
    np.testing.assert_array_equal(on_device.prefill(0, PROMPTS[0]), on_host.prefill(0, PROMPTS[0]))


def continued(cache, prefixes, how):
    """The logits of a prompt or of a step that follows on prefixes alone."""
    for row, prefix in enumerate(prefixes):
        cache.seed(row, prefix)
    if how == "prefill":
        return [cache.prefill(row, prompt).copy() for row, prompt in enumerate(PROMPTS)]
    if how == "choose":
        return cache.choose([9] * ROWS, more=3)
    if how == "move":
        cache.move(4, 1)
    return cache.step([9] * ROWS).copy()


@pytest.mark.parametrize("how", ["prefill", "step", "choose", "move"])
def test_a_prefix_is_copied_before_anything_reads_its_row(on_device, on_host, make_prefix, how):
    prefixes = [make_prefix(3 + row, seed=row, dtype=np.float16, position_base=0) for row in range(ROWS)]
    on_device._prefixes._budget = 0  # each is let go of as soon as the next is asked for, and copied all the same
    np.testing.assert_array_equal(continued(on_device, prefixes, how), continued(on_host, prefixes, how))
    assert on_device._awaited is None


def test_a_prefix_that_cannot_be_copied_is_copied_by_the_next_run(on_device, on_host, prefixes, monkeypatch):
    on_device.seed(0, prefixes[0])
    with monkeypatch.context() as patch:
        patch.setattr(DeviceBuffer, "copy_row", failing)
        with pytest.raises(ProviderError):
            on_device.prefill(0, PROMPTS[0])
    on_device.reset(0)
    on_host.seed(0, prefixes[0])
    np.testing.assert_array_equal(on_device.prefill(0, PROMPTS[0]), on_host.prefill(0, PROMPTS[0]))


def test_a_row_that_cannot_be_moved_holds_no_prefix(on_device, prefixes, monkeypatch):
    begun(on_device, prefixes)
    monkeypatch.setattr(DeviceBuffer, "copy_row", failing)
    with pytest.raises(ProviderError):
        on_device.move(4, 1)
    assert on_device.rows[1].prefix is None


class TestPrefixStore:
    def test_the_least_recently_used_go_first(self, device, geometry, make_prefix):
        one = 4 * 2 * geometry.values_per_position
        resident = PrefixStore(device, geometry, HALF, 2 * one)
        first, second, third = (make_prefix(4, seed=seed) for seed in range(3))
        places = [resident.get(first), resident.get(second)]
        assert resident.get(first) is places[0]
        resident.get(third)
        assert resident.nbytes == 2 * one
        assert resident.get(first) is places[0]
        assert resident.get(second) is not places[1]

    def test_one_beyond_the_budget_is_there_while_it_is_needed(self, device, geometry, make_prefix):
        resident = PrefixStore(device, geometry, HALF, 0)
        prefix = make_prefix(4)
        assert resident.get(prefix) is resident.get(prefix)

    def test_what_is_forgotten_is_brought_in_again(self, resident, make_prefix):
        prefix = make_prefix(4)
        place = resident.get(prefix)
        resident.forget(prefix)
        assert resident.nbytes == 0
        assert resident.get(prefix) is not place

    def test_a_prefix_larger_than_the_staging_arrives_whole(self, device, geometry, make_prefix, monkeypatch):
        monkeypatch.setattr("prefix_runtime.backends.gpu.prefix_store._PIECE_BYTES", 96)
        prefix = make_prefix(7)
        buffer = PrefixStore(device, geometry, HALF, 1 << 30).get(prefix)
        for index, layer in enumerate(prefix.sites["decoder"]):
            for part, array in enumerate((layer.key, layer.value)):
                found = np.empty(array.shape, np.float16)
                device.stream.download(found, buffer.address(index, part))
                np.testing.assert_array_equal(found, array.astype(np.float16))

    @pytest.mark.parametrize("place", ["_fill", "_Staging._send"])
    def test_after_a_failure_prefixes_are_brought_in_as_before(self, device, geometry, make_prefix, monkeypatch, place):
        monkeypatch.setattr("prefix_runtime.backends.gpu.prefix_store._PIECE_BYTES", 96)
        resident = PrefixStore(device, geometry, HALF, 1 << 30)
        prefix = make_prefix(7)
        with monkeypatch.context() as broken:
            broken.setattr(f"prefix_runtime.backends.gpu.prefix_store.{place}", failing)
            for _ in range(20):
                with pytest.raises(ProviderError):
                    resident.get(prefix)
        assert resident.nbytes == 0
        layer, buffer = prefix.sites["decoder"][-1], resident.get(prefix)
        found = np.empty(layer.value.shape, np.float16)
        device.stream.download(found, buffer.address(len(geometry.layers) - 1, 1))
        np.testing.assert_array_equal(found, layer.value.astype(np.float16))


def test_bandwidth_is_what_a_copy_reads_and_writes(device, monkeypatch):
    monkeypatch.setattr(bandwidth, "MOST_BYTES", 1 << 10)
    clock = iter([0.0, 3.0, 10.0, 12.0, 20.0, 25.0, 30.0, 34.0])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(clock))
    assert bandwidth.CopyProbe(device).measure() == 2 * device.stream.copied["copy"] / 4 / 2.0


class TestEngine:
    """An engine that keeps what it can on the device, against one that runs the same graph on the host."""

    @pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.3), Sampling(1.0, seed=3)])
    def test_answers_are_those_of_the_host(self, engine, plain, sampling):
        options = {
            "task": ["p3", None, "p20", "p3", "p20+p3"],
            "max_new_tokens": [9, 12, 3, 20, 1],
            "sampling": sampling,
        }
        prompts = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]]
        found, expected = (each.generate(token_ids=prompts, **options) for each in (engine, plain))
        assert [result.token_ids for result in found] == [result.token_ids for result in expected]

    def test_streamed_answers_are_those_of_the_host(self, engine, plain):
        found, expected = (
            "".join(chunk.text for chunk in each.stream("the quick", task="p20")) for each in (engine, plain)
        )
        assert found == expected

    def test_one_buffer_serves_every_task(self, engine, monkeypatch):
        made = []
        begin = CudaCache.__init__
        monkeypatch.setattr(
            CudaCache, "__init__", lambda cache, *args, **options: (made.append(1), begin(cache, *args, **options))[1]
        )
        for task in ("p3", "p20", None, "p3"):
            engine.generate(token_ids=[5, 6], task=task, max_new_tokens=4)
        assert len(made) == 1

    def test_a_removed_task_leaves_nothing_on_the_device(self, engine, make_prefix):
        engine.add_task("gone", make_prefix(8))
        before = engine.generate(token_ids=[5, 6], task="gone", max_new_tokens=6).token_ids
        engine.remove_task("gone")
        assert engine._backend.prefixes.nbytes == 0
        engine.add_task("gone", make_prefix(8, seed=5))
        assert engine.generate(token_ids=[5, 6], task="gone", max_new_tokens=6).token_ids != before


class TestCuda:
    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"device": -1}, "cuda: device: expected a whole number, 0 or more, found -1"),
            ({"device": True}, "cuda: device: expected a whole number, 0 or more, found True"),
            ({"memory_limit": 0}, "cuda: memory_limit: expected a whole number, 1 or more, found 0"),
            ({"stream": "s"}, "cuda: stream: expected a whole number, 1 or more, found 's'"),
            ({"uses_graphs": "no"}, "cuda: uses_graphs: expected True or False, found 'no'"),
            ({"prefix_bytes": 1.5}, "cuda: prefix_bytes: expected a whole number, 0 or more, found 1.5"),
        ],
    )
    def test_settings_out_of_range_are_refused(self, setting, message):
        with pytest.raises(ProviderError) as refused:
            Cuda(**setting)
        assert str(refused.value) == message

    @pytest.mark.parametrize("provider", ["cuda", Cuda(device=3)])
    def test_an_onnxruntime_without_it_is_named(self, opened, provider):
        with pytest.raises(ProviderError, match=r"^provider 'cuda': this onnxruntime has only "):
            prefix_runtime.load(opened.root, provider=provider)

    def test_a_bundle_for_cpus_is_refused_before_it_is_opened(self, shared_bundle):
        with pytest.raises(ProviderError, match=r"expected cpu for a bundle of target cpu, found cuda; build it with "):
            prefix_runtime.load(shared_bundle, provider="cuda")

    def test_what_is_no_provider_is_refused(self, opened):
        with pytest.raises(ProviderError, match=r"^provider: expected one of cpu, .*found b'cuda'$"):
            prefix_runtime.load(opened.root, provider=b"cuda")

    def test_settings_are_values(self):
        assert replace(Cuda(), device=1) == Cuda(device=1)
