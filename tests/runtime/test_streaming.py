"""A stream's chunks make up the result; a stream may be left at any moment."""

from __future__ import annotations

import numpy as np
import pytest

import prefix_runtime
from prefix_runtime import BusyError, ContextOverflowError, RequestError, Sampling, UnknownTaskError

PROMPT = "the lazy dog"
TASKS = [None, "p3", "p20"]


@pytest.fixture
def own(shared_bundle):
    """An engine of the test's own."""
    return prefix_runtime.load(shared_bundle, threads=1)


def all_of(engine, task=None, **options):
    result = engine.generate(PROMPT, task=task, max_new_tokens=20, **options)
    return result.text, result.token_ids, result.finish_reason


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_new_tokens": 1}, {"stop": ["a", "."]}, {"sampling": Sampling(temperature=1, seed=3)}],
    ids=["greedy", "one", "stop", "sampled"],
)
def test_chunks_make_up_the_result_of_generate(engine, task, options):
    options = {"max_new_tokens": 40} | options
    chunks = list(engine.stream(PROMPT, task=task, **options))
    result = engine.generate(PROMPT, task=task, **options)
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert tuple(chunk.token_id for chunk in chunks) == result.token_ids
    last = chunks[-1].result
    assert (last.text, last.token_ids, last.finish_reason, last.task) == (
        result.text,
        result.token_ids,
        result.finish_reason,
        task,
    )


def test_the_last_chunk_alone_has_the_result(engine):
    *chunks, last = engine.stream(PROMPT, max_new_tokens=7)
    assert len(chunks) == 6
    assert all(chunk.result is None for chunk in chunks)
    assert last.result.metrics.new_tokens == 7


def test_what_was_held_back_for_a_stop_string_comes_with_the_last_chunk(engine):
    free = engine.generate(PROMPT, task="p3", max_new_tokens=12)
    chunks = list(engine.stream(PROMPT, task="p3", max_new_tokens=12, stop=[free.text[2:] + "!"]))
    assert "".join(chunk.text for chunk in chunks[:-1]) == free.text[:2]
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].result.text == free.text
    assert chunks[-1].result.finish_reason == "length"


def test_token_ids_are_streamed(engine):
    chunks = list(engine.stream(token_ids=[5, 6, 7], task="p3", max_new_tokens=5))
    expected = engine.generate(token_ids=[5, 6, 7], task="p3", max_new_tokens=5).token_ids
    assert tuple(chunk.token_id for chunk in chunks) == expected


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({}, RequestError),
        ({"prompt": ""}, RequestError),
        ({"prompt": ["a", "b"]}, RequestError),
        ({"token_ids": [[1], [2]]}, RequestError),
        ({"token_ids": [999]}, RequestError),
        ({"prompt": "a", "task": "p4"}, UnknownTaskError),
        ({"prompt": "a", "max_new_tokens": 0}, RequestError),
        ({"prompt": "a", "max_new_tokens": 500}, ContextOverflowError),
        ({"prompt": "a", "stop": ""}, RequestError),
        ({"prompt": "a", "stops": "b"}, TypeError),
    ],
)
def test_a_wrong_request_is_refused_by_the_call_and_not_by_the_first_step(engine, request_, error):
    with pytest.raises(error):
        engine.stream(**request_)


def test_a_list_is_refused_by_name(engine):
    with pytest.raises(RequestError, match="stream: expected one prompt, found a list; use generate"):
        engine.stream(["a"])


@pytest.mark.parametrize("taken", [1, 2, 9])
@pytest.mark.parametrize("leave", ["close", "forget"])
def test_a_stream_that_is_left_gives_its_buffer_back_and_changes_no_later_answer(own, taken, leave):
    expected = {task: all_of(own, task) for task in TASKS}
    for task in TASKS:
        stream = own.stream(PROMPT, task=task, max_new_tokens=50)
        for _ in range(taken):
            next(stream)
        assert own._pool.lent_bytes > 0
        if leave == "close":
            stream.close()
        else:
            del stream
        assert own._pool.lent_bytes == 0
    assert {task: all_of(own, task) for task in TASKS} == expected


def test_a_stream_that_was_never_begun_takes_no_buffer(own):
    stream = own.stream(PROMPT)
    assert (own._pool.lent_bytes, own._pool._idle) == (0, [])
    stream.close()


def test_a_finished_stream_gives_its_buffer_back(own):
    list(own.stream(PROMPT, max_new_tokens=3))
    assert own._pool.lent_bytes == 0
    assert len(own._pool._idle) == 1


@pytest.mark.parametrize("others", [["p3"], ["p3", "p20", None]])
def test_streams_that_take_turns_do_not_mix(own, others):
    expected = {task: list(own.generate(PROMPT, task=task, max_new_tokens=15).token_ids) for task in others}
    streams = [(task, own.stream(PROMPT, task=task, max_new_tokens=15)) for task in others * 2]
    found = [(task, []) for task, _ in streams]
    for _ in range(15):
        for (_, stream), (_, ids) in zip(streams, found, strict=True):
            ids.extend(chunk.token_id for chunk in [next(stream, None)] if chunk)
    assert found == [(task, expected[task]) for task, _ in streams]


def test_a_task_that_is_removed_while_it_streams_streams_on(own):
    expected = all_of(own, "p3")
    stream = own.stream(PROMPT, task="p3", max_new_tokens=20)
    begun = [next(stream), next(stream)]
    own.remove_task("p3")
    chunks = [*begun, *stream]
    last = chunks[-1].result
    assert (last.text, last.token_ids, last.finish_reason) == expected
    with pytest.raises(UnknownTaskError):
        own.stream(PROMPT, task="p3")


def test_a_task_that_is_replaced_while_it_streams_streams_on_and_then_answers_anew(own, make_prefix):
    expected = all_of(own, "p3")
    stream = own.stream(PROMPT, task="p3", max_new_tokens=20)
    next(stream)
    own.remove_task("p3")
    own.add_task("p3", make_prefix(3, seed=9))
    during = own.logits([5, 6], "p3")
    *_, last = stream
    assert last.result.token_ids == expected[1]
    np.testing.assert_array_equal(own.logits([5, 6], "p3"), during)
    assert all_of(own, "p3") != expected


def test_no_chunk_ends_within_a_character(engine, tokenizer):
    # A random model's tokens are bytes of all kinds: what is given out is never taken back.
    for seed in range(10):
        sampling = Sampling(temperature=3, seed=seed)
        grown, ids = "", []
        for chunk in engine.stream(PROMPT, max_new_tokens=60, sampling=sampling):
            grown += chunk.text
            ids.append(chunk.token_id)
            assert tokenizer.decode(ids).startswith(grown)
        assert grown == chunk.result.text


def test_open_streams_keep_to_a_limit_and_say_what_to_do(shared_bundle):
    size = prefix_runtime.load(shared_bundle, threads=1)._pool._position_bytes * 64
    own = prefix_runtime.load(shared_bundle, threads=1, cache_bytes=0, max_cache_bytes=3 * size)
    streams = [own.stream(PROMPT, task=task, max_new_tokens=20) for task in TASKS]
    begun = [next(stream) for stream in streams]
    with pytest.raises(BusyError, match=f"at most {3 * size} bytes .* wait for a request to end, close a stream, or"):
        own.generate(PROMPT, max_new_tokens=20)
    with pytest.raises(BusyError):
        next(own.stream(PROMPT, max_new_tokens=20))
    streams.pop().close()
    assert all_of(own)[1][0] == begun[0].token_id
    assert [chunk.token_id for chunk in streams[0]] == list(all_of(own)[1][1:])


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "1"])
def test_a_limit_that_is_none_is_refused(shared_bundle, wrong):
    with pytest.raises(RequestError, match=r"^max_cache_bytes: expected a whole number, 0 or more, or None, found "):
        prefix_runtime.load(shared_bundle, max_cache_bytes=wrong)
