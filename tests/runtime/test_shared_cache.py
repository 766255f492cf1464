"""Key/value buffers: right whatever lies in them, seeded once, lent to one at a time, bounded."""

from __future__ import annotations

import weakref
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import prefix_runtime
from prefix_runtime import Bundle, BusyError, ContextOverflowError, RequestError
from prefix_runtime.backends.onnxruntime.session import Session
from prefix_runtime.backends.onnxruntime.shared_cache import SharedCache
from prefix_runtime.cache.pool import CachePool
from prefix_runtime.prefix.cache_format import CacheFormat

PROMPT, NEXT = [5, 6, 7, 260], [8, 9, 3]
TOLERANCE = 1e-4
FLOAT = CacheFormat(np.dtype(np.float32))


@pytest.fixture(scope="module")
def opened(shared_bundle):
    return Bundle.open(shared_bundle)


@pytest.fixture(scope="module")
def session(opened):
    return Session(opened.graph_path, threads=1)


@pytest.fixture(scope="module")
def geometry(opened):
    return opened.manifest.geometry


@pytest.fixture(scope="module")
def model(workshop):
    pytest.importorskip("torch")
    return (
        pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(workshop.model(tokenizer=True)).eval()
    )


@pytest.fixture
def new_cache(session, geometry):
    return lambda capacity=64, rows=1: SharedCache(session, geometry, rows, capacity, FLOAT)


@pytest.fixture
def new_pool(session, geometry):
    make = partial(SharedCache, session, geometry, cache_format=FLOAT)
    position_bytes = 4 * geometry.values_per_position
    return lambda budget=1 << 30, max_length=320: CachePool(make, position_bytes, max_length, budget)


@pytest.fixture
def seeds(monkeypatch):
    """How often each prefix was copied into a cache."""
    counter, seed = Counter(), SharedCache.seed

    def count(cache, row, prefix):
        counter[prefix] += 1
        seed(cache, row, prefix)

    monkeypatch.setattr(SharedCache, "seed", count)
    return counter


def answer(cache, prompt=PROMPT):
    """The logits [1 + steps, vocab] after a prompt and after each of some more tokens."""
    return np.array([cache.prefill(0, prompt).copy(), *(cache.step([token])[0].copy() for token in NEXT)])


def cache_of(new_cache, prefix, capacity=64, fill=0.0):
    cache = new_cache(capacity)
    for array in (array for layer in cache._layers for array in layer):
        array.fill(fill)
    cache.seed(0, prefix)
    return cache


class TestCache:
    @pytest.mark.parametrize("base", ["behind the prefix", "0"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_logits_are_those_of_transformers_with_the_prefix_as_its_past(
        self, new_cache, model, make_prefix, base, dtype
    ):
        length = 6
        prefix = make_prefix(length, dtype=dtype, position_base=0 if base == "0" else length)
        import torch
        from transformers import DynamicCache

        past = DynamicCache()
        for index, layer in enumerate(prefix.sites["decoder"]):
            key, value = (torch.tensor(array.astype(np.float32))[None] for array in (layer.key, layer.value))
            past.update(key, value, index)
        ids = torch.tensor([[*PROMPT, *NEXT]])
        positions = prefix.position_base + torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            mask = torch.ones(1, length + ids.shape[1])
            expected = model(ids, past_key_values=past, position_ids=positions, attention_mask=mask).logits[0].numpy()
        found = cache_of(new_cache, prefix)
        np.testing.assert_allclose(answer(found), expected[len(PROMPT) - 1 :], rtol=0, atol=TOLERANCE)
        found.reset(0)
        every = found.prefill(0, [*PROMPT, *NEXT], keep_all_logits=True)
        np.testing.assert_allclose(every, expected, rtol=0, atol=TOLERANCE)

    def test_the_two_position_bases_give_other_logits(self, new_cache, make_prefix):
        one, other = (answer(cache_of(new_cache, make_prefix(6, position_base=base))) for base in (0, 6))
        assert np.abs(one - other).max() > 100 * TOLERANCE

    @pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
    @pytest.mark.parametrize("length", [None, 4, 20])
    @pytest.mark.parametrize("capacity", [27, 64, 320])
    def test_what_lies_in_unused_positions_does_not_matter(self, new_cache, make_prefix, garbage, length, capacity):
        prefix = length and make_prefix(length)
        clean, dirty = (cache_of(new_cache, prefix, capacity, fill) for fill in (0.0, garbage))
        np.testing.assert_array_equal(answer(dirty), answer(clean))

    @pytest.mark.parametrize("capacity", [7, 8, 100, 320])
    def test_the_capacity_does_not_matter(self, new_cache, capacity):
        np.testing.assert_allclose(
            answer(cache_of(new_cache, None, capacity)), answer(cache_of(new_cache, None)), rtol=0, atol=TOLERANCE
        )

    @pytest.mark.parametrize("length", [None, 5])
    def test_a_reset_cache_answers_as_a_new_one(self, new_cache, make_prefix, length):
        prefix = length and make_prefix(length)
        cache = cache_of(new_cache, prefix)
        first = answer(cache)
        answer_to_another = answer(cache_of(new_cache, prefix), [300, 2, 2])
        for _ in range(2):
            cache.reset(0)
            np.testing.assert_array_equal(answer(cache, [300, 2, 2]), answer_to_another)
            cache.reset(0)
            np.testing.assert_array_equal(answer(cache), first)

    @pytest.mark.parametrize("lengths", [(20, 3), (3, 20), (20, None), (None, 20)])
    def test_a_cache_that_is_seeded_anew_forgets_what_it_held(self, new_cache, make_prefix, lengths):
        before, after = (length and make_prefix(length, seed=length) for length in lengths)
        cache = cache_of(new_cache, before)
        answer(cache, [9] * 30)
        cache.seed(0, after)
        np.testing.assert_array_equal(answer(cache), answer(cache_of(new_cache, after)))

    def test_the_prefix_stays_as_it_was(self, new_cache, make_prefix):
        prefix = make_prefix(5)
        cache = cache_of(new_cache, prefix)
        answer(cache)
        np.testing.assert_array_equal(cache._layers[2][1][0, :, :5], prefix.sites["decoder"][2].value)
        assert prefix == make_prefix(5)

    def test_length_and_position_are_counted(self, new_cache, make_prefix):
        cache = cache_of(new_cache, make_prefix(5, position_base=0))
        assert (cache.rows[0].length, cache.rows[0].position) == (5, 0)
        answer(cache)
        assert (cache.rows[0].length, cache.rows[0].position) == (12, 7)
        cache.seed(0, None)
        assert (cache.rows[0].length, cache.rows[0].position) == (0, 0)

    def test_a_cache_may_be_filled_to_its_end_and_no_further(self, new_cache):
        cache = cache_of(new_cache, None, capacity=len(PROMPT) + 1)
        cache.prefill(0, PROMPT)
        cache.step([1])
        with pytest.raises(ContextOverflowError, match="expected at most 5 positions, found 6"):
            cache.step([1])

    def test_it_takes_what_its_geometry_says(self, new_cache):
        # Keys and values, 3 layers, 4 heads, 64 positions, 16 numbers, 4 bytes.
        assert new_cache(64).nbytes == 2 * 3 * 4 * 64 * 16 * 4

    def test_an_interrupted_seed_is_not_taken_for_a_whole_one(self, new_pool, new_cache, make_prefix):
        def interrupted():
            yield make_prefix(4, seed=1).sites["decoder"][0]
            raise KeyboardInterrupt

        prefix, pool = make_prefix(4), new_pool()
        with pool.lease([prefix], 32) as (cache, _):
            pass
        pool._budget = cache.nbytes
        other = SimpleNamespace(prefix_length=4, sites={"decoder": interrupted()})
        with pytest.raises(KeyboardInterrupt), pool.lease([other], 32):
            pytest.fail("the cache is not whole")
        with pool.lease([prefix], 32) as (again, _):
            assert again is not cache
            np.testing.assert_array_equal(answer(again), answer(cache_of(new_cache, prefix)))


class TestRows:
    """Rows of other prefixes, bases and lengths, in one cache."""

    PROMPTS = ([5, 6, 7, 260], [9], [11, 12, 13, 14, 15, 16, 17])

    @pytest.fixture
    def prefixes(self, make_prefix):
        return [make_prefix(6, seed=1), None, make_prefix(20, seed=2, position_base=0)]

    @pytest.fixture
    def filled(self, new_cache, prefixes):
        cache = new_cache(64, rows=3)
        for row, prefix in enumerate(prefixes):
            cache.seed(row, prefix)
        return cache

    def test_each_row_answers_as_if_it_were_alone(self, new_cache, filled, prefixes):
        expected = [
            answer(cache_of(new_cache, prefix), prompt) for prefix, prompt in zip(prefixes, self.PROMPTS, strict=True)
        ]
        first = [filled.prefill(row, prompt).copy() for row, prompt in enumerate(self.PROMPTS)]
        rest = [filled.step([token] * 3).copy() for token in NEXT]
        for row in range(3):
            found = [first[row], *(logits[row] for logits in rest)]
            np.testing.assert_allclose(found, expected[row], rtol=0, atol=TOLERANCE)

    def test_a_row_goes_on_in_the_place_of_another(self, new_cache, filled, prefixes):
        expected = answer(cache_of(new_cache, prefixes[2]), self.PROMPTS[2])
        found = [[filled.prefill(row, prompt).copy() for row, prompt in enumerate(self.PROMPTS)][2]]
        found.append(filled.step([NEXT[0]] * 3)[2].copy())
        filled.move(2, 0)
        assert filled.rows[0].prefix is prefixes[2]
        found += [filled.step([token])[0].copy() for token in NEXT[1:]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)

    def test_a_row_that_was_moved_leaves_its_prefix_where_it_was(self, new_cache, filled, prefixes):
        filled.prefill(2, self.PROMPTS[2])
        filled.move(2, 0)
        filled.reset(2)
        filled.reset(0)
        expected = answer(cache_of(new_cache, prefixes[2]))[0]
        for row in (0, 2):
            np.testing.assert_allclose(filled.prefill(row, PROMPT), expected, rtol=0, atol=TOLERANCE)

    def test_a_full_row_is_refused_before_any_is_changed(self, new_cache):
        cache = new_cache(5, rows=2)
        cache.prefill(0, [1, 2])
        cache.prefill(1, [1, 2, 3, 4, 5])
        with pytest.raises(ContextOverflowError, match="expected at most 5 positions, found 6"):
            cache.step([1, 1])
        assert [row.length for row in cache.rows] == [2, 5]


@pytest.mark.parametrize(("kind", "tolerance"), [pytest.param("fp16", 2e-2, marks=pytest.mark.families), ("int8", 0.5)])
def test_a_rounded_cache_answers_nearly_as_one_of_float32(workshop, kind, tolerance):
    answers = []
    for cache in ("fp32", kind):
        opened = Bundle.open(workshop.bundle(cache=cache))
        session, geometry = Session(opened.graph_path, threads=1), opened.manifest.geometry
        cache_format = CacheFormat.of_bundle(opened.root, cache, geometry)
        held = SharedCache(session, geometry, 1, 64, cache_format)
        held.seed(0, opened.prefix("p20"))
        answers.append(answer(held))
    # Numbers of eleven or eight bits, a few of which are summed, under logits of about 5.
    np.testing.assert_allclose(*answers, rtol=0, atol=tolerance)
    assert np.abs(answers[0] - answers[1]).max() > 0


class TestPool:
    def test_a_task_finds_the_cache_that_holds_its_prefix_and_copies_nothing(self, new_pool, seeds, make_prefix):
        pool, prefix = new_pool(), make_prefix()
        with pool.lease([prefix], 40) as (first, _):
            answer(first)
        for _ in range(3):
            with pool.lease([prefix], 40) as (again, _):
                assert again is first
                answer(again)
        assert seeds == {prefix: 1}

    def test_a_cache_that_is_given_back_while_the_pool_is_busy_does_not_wait(self, new_pool, make_prefix):
        # As a stream that nobody reads on does, which is collected in the middle of another request's beginning.
        pool, prefix = new_pool(), make_prefix()
        lease = pool.lease([prefix], 40)
        cache, _ = lease.__enter__()
        with pool._lock:
            lease.__exit__(None, None, None)
        with pool.lease([prefix], 40) as (again, _):
            assert again is cache

    def test_tasks_that_take_turns_keep_their_caches(self, new_pool, seeds, make_prefix):
        pool, tasks = new_pool(), [make_prefix(seed=0), make_prefix(seed=1), None]
        caches = {}
        for task in tasks * 4:
            with pool.lease([task], 40) as (cache, _):
                assert caches.setdefault(task, cache) is cache
                assert cache.rows[0].prefix is task
        assert all(seeds[task] <= 1 for task in tasks)

    def test_an_equal_prefix_of_another_object_is_right_too(self, new_pool, new_cache, make_prefix):
        pool = new_pool()
        for _ in range(2):
            with pool.lease([make_prefix()], 40) as (cache, _):
                np.testing.assert_array_equal(answer(cache), answer(cache_of(new_cache, make_prefix())))

    @pytest.mark.parametrize("budget", [1, 1 << 30])
    def test_a_running_cache_is_never_lent_twice(self, new_pool, make_prefix, budget):
        pool, prefix = new_pool(budget), make_prefix()
        with (
            pool.lease([prefix], 40) as (one, _),
            pool.lease([prefix], 40) as (two, _),
            pool.lease([None], 40) as (three, _),
        ):
            assert len({id(one), id(two), id(three)}) == 3
            np.testing.assert_array_equal(answer(one), answer(two))
            assert np.abs(answer(three)[0] - one._logits[0, 0]).max() > 0

    def test_over_the_budget_the_oldest_idle_cache_is_seeded_anew(self, new_pool, seeds, make_prefix):
        one, two, three = (make_prefix(seed=seed) for seed in range(3))
        pool = new_pool()
        with pool.lease([one], 40) as (oldest, _), pool.lease([two], 40) as (newer, _):
            pass
        # They were given back in the other order: the inner one first.
        oldest, newer, one, two = newer, oldest, two, one
        pool._budget = 2 * oldest.nbytes
        with pool.lease([three], 40) as (cache, _):
            assert cache is oldest
        with pool.lease([two], 40) as (cache, _):
            assert cache is newer
        assert seeds == {one: 1, two: 1, three: 1}

    def test_over_the_budget_the_least_recently_used_are_dropped(self, new_pool, make_prefix):
        tasks, pool = [make_prefix(seed=seed) for seed in range(4)], new_pool()
        for task in (*tasks, tasks[0]):
            with pool.lease([task], 40) as (cache, _):
                pass
        pool._budget = 3 * cache.nbytes
        with pool.lease([tasks[3]], 40):
            pass
        assert [cache.rows[0].prefix for cache in pool._idle] == [tasks[2], tasks[0], tasks[3]]

    def test_idle_caches_are_dropped_for_a_running_one_that_needs_their_room(self, new_pool, make_prefix):
        pool = new_pool()
        for seed in range(3):
            with pool.lease([make_prefix(seed=seed)], 10) as (small, _):
                pass
        pool._budget = 4 * small.nbytes
        with pool.lease([None], 320) as (large, _):
            assert large.nbytes > 2 * small.nbytes
            assert large.nbytes + sum(cache.nbytes for cache in pool._idle) <= max(pool._budget, large.nbytes)

    @pytest.mark.parametrize("caches", [0, 1, 2])
    def test_idle_caches_stay_within_the_budget(self, new_pool, make_prefix, caches):
        with new_pool().lease([None], 40) as (cache, _):
            pool = new_pool(caches * cache.nbytes)
        for seed in range(5):
            with pool.lease([make_prefix(seed=seed)], 40):
                pass
        assert len(pool._idle) == caches
        assert pool.lent_bytes == 0

    def test_running_caches_are_never_dropped(self, new_pool, new_cache, make_prefix):
        pool, prefix = new_pool(budget=1), make_prefix()
        with pool.lease([prefix], 40) as (running, _):
            first = running.prefill(0, PROMPT).copy()
            for seed in range(1, 4):
                with pool.lease([make_prefix(seed=seed)], 40) as (other, _):
                    assert other is not running
                    answer(other)
            rest = [running.step([token])[0].copy() for token in NEXT]
        np.testing.assert_array_equal([first, *rest], answer(cache_of(new_cache, prefix)))

    def test_a_longer_request_gets_a_larger_cache(self, new_pool, make_prefix):
        pool, prefix = new_pool(), make_prefix()
        with pool.lease([prefix], 10) as (small, _):
            pass
        with pool.lease([prefix], 310) as (large, _):
            assert large is not small
            assert large.capacity >= 310
        with pool.lease([prefix], 200) as (cache, _):
            assert cache is large

    @pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 299, 300])
    def test_a_cache_has_room_for_the_request_and_no_more_than_the_model(self, new_pool, length):
        with new_pool(max_length=300).lease([None], length) as (cache, _):
            assert length <= cache.capacity <= 300

    def test_a_forgotten_prefix_gives_its_idle_caches_back(self, new_pool, make_prefix):
        pool, prefix, other = new_pool(), make_prefix(seed=0), make_prefix(seed=1)
        for task in (prefix, other):
            with pool.lease([task], 40):
                pass
        pool.forget(prefix)
        assert [cache.rows[0].prefix for cache in pool._idle] == [other]

    def test_a_prefix_that_is_forgotten_while_its_request_runs_gives_its_cache_back_at_the_end(
        self, new_pool, make_prefix
    ):
        pool, prefix = new_pool(), make_prefix(seed=0)
        with pool.lease([prefix], 40), pool.lease([None], 40):
            pool.forget(prefix)
        assert [cache.rows[0].prefix for cache in pool._idle] == [None]
        assert pool.lent_bytes == 0

    def test_a_cache_that_was_left_with_an_error_is_freed(self, new_pool):
        pool = new_pool()
        leases = []

        def fail():
            with pool.lease([None], 40) as (cache, _):
                leases.append(weakref.ref(cache))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError) as caught:
            fail()
        assert (pool._idle, pool.lent_bytes) == ([], 0)
        del caught
        assert leases[0]() is None

    def test_running_requests_keep_to_a_limit(self, new_cache, make_prefix):
        size = new_cache(64).nbytes
        pool = CachePool(lambda rows, capacity: new_cache(capacity, rows), size // 64, 320, 10 * size, limit=2 * size)
        with pool.lease([None], 40), pool.lease([make_prefix()], 40):
            with pytest.raises(
                BusyError, match=f"expected .* at most {2 * size} bytes .* found {2 * size} in use and "
            ):
                pool.lease([None], 40).__enter__()
            assert pool.lent_bytes == 2 * size
        with pytest.raises(RequestError, match=f"at most {2 * size} .* one of {3 * size}; lower num_beams, ") as caught:
            pool.lease([None] * 3, 40).__enter__()
        assert not isinstance(caught.value, BusyError)

    def test_a_cache_that_could_not_be_made_is_not_counted(self, new_pool, monkeypatch):
        def fail(*_, **__):
            raise MemoryError

        pool = new_pool()
        with monkeypatch.context() as patch:
            patch.setattr(SharedCache, "__init__", fail)
            with pytest.raises(MemoryError), pool.lease([None], 40):
                pytest.fail("there is no cache")
        assert pool.lent_bytes == 0


class TestPoolOfBatches:
    def test_the_rows_of_a_batch_are_those_that_hold_its_prefixes_already(self, new_pool, seeds, make_prefix):
        one, two, three = (make_prefix(seed=seed) for seed in range(3))
        pool = new_pool()
        with pool.lease([one, two, None], 40) as (cache, rows):
            assert [cache.rows[row].prefix for row in rows] == [one, two, None]
        with pool.lease([two, None, one], 40) as (again, rows):
            assert again is cache
            assert [again.rows[row].prefix for row in rows] == [two, None, one]
        with pool.lease([three, one], 40) as (again, rows):
            assert again is cache
            assert sorted(rows) == [0, 1]
            assert [again.rows[row].prefix for row in rows] == [three, one]
        assert {prefix: count for prefix, count in seeds.items() if prefix} == {one: 1, two: 1, three: 1}

    def test_a_task_may_have_several_rows(self, new_pool, make_prefix):
        prefix = make_prefix()
        with new_pool().lease([prefix, prefix], 40) as (cache, rows):
            assert sorted(rows) == [0, 1]
            first, second = (cache.prefill(row, PROMPT).copy() for row in rows)
            np.testing.assert_array_equal(first, second)

    def test_a_single_request_does_not_take_a_batchs_cache(self, new_pool, make_prefix):
        pool, prefix = new_pool(), make_prefix()
        with pool.lease([prefix, None], 40) as (batch, _):
            pass
        with pool.lease([prefix], 40) as (single, _):
            assert single is not batch

    def test_a_forgotten_prefix_gives_a_batchs_cache_back(self, new_pool, make_prefix):
        pool, prefix = new_pool(), make_prefix()
        with pool.lease([None, prefix], 40):
            pass
        pool.forget(prefix)
        assert pool._idle == []


def test_tasks_that_take_turns_are_answered_as_by_engines_of_their_own(shared_bundle, seeds):
    engine = prefix_runtime.load(shared_bundle, threads=1)
    turns = ["p3", "p20", "p3", None, "p3", "p20", None]
    found = [engine.generate(token_ids=PROMPT, task=task, max_new_tokens=12).token_ids for task in turns]
    assert {count for prefix, count in seeds.items() if prefix is not None} == {1}
    for task in ("p3", "p20", None):
        own = prefix_runtime.load(shared_bundle, threads=1)
        alone = own.generate(token_ids=PROMPT, task=task, max_new_tokens=12).token_ids
        assert {tokens for tokens, name in zip(found, turns, strict=True) if name == task} == {alone}
    assert len(set(found)) == 3
