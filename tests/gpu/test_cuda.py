"""On a real GPU: what the device in the host's memory (`tests/runtime/host_device.py`) cannot show. `make test-gpu`."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import prefix_runtime
from prefix_runtime import Bundle, Cuda, ProviderError, Sampling
from prefix_runtime.backends.onnxruntime.cuda_cache import CudaCache
from prefix_runtime.bench.inputs import random_prefix
from prefix_runtime.cli.main import main
from tests.end_to_end.test_parity_with_peft import ARCHITECTURES
from tests.workshop import VOCAB_SIZE

pytestmark = pytest.mark.gpu

NEW = 24
TIE = 0.1  # of logits in float16, which reach 30
MIB = 1 << 20


@pytest.fixture(scope="module")
def bundle(workshop):
    return workshop.bundle(target="cuda")


def requests(count, seed=0):
    """Prompts of several lengths under several tasks, in an order that no two seeds share."""
    random = np.random.default_rng(seed)
    tasks = islice(cycle(["p3", None, "p20", "p20+p3"]), count)
    prompts = [random.integers(1, VOCAB_SIZE, size=random.integers(1, 40)).tolist() for _ in range(count)]
    return list(zip(prompts, random.permutation(list(tasks)).tolist(), strict=True))


def answer(engine, prompt, task, **options):
    return engine.generate(token_ids=prompt, task=task, max_new_tokens=NEW, ignore_end=True, **options).token_ids


def agree(engine, request, left, right):
    """Whether answers are alike, up to two tokens as likely as each other: kernels for a shape are chosen by time."""
    prompt, task = request
    for index, pair in enumerate(zip(left, right, strict=True)):
        if len(set(pair)) > 1:
            logits = engine.logits([*prompt, *left[:index]], task)[-1]
            return abs(np.diff(logits[list(pair)])[0]) < TIE
    return True


def free_bytes():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_build_agrees_with_peft_on_the_gpu(workshop, architecture, precision):
    # `build` compares logits and tokens of every task with PEFT's model and fails where they differ.
    opened = Bundle.open(workshop.bundle(architecture, (20,), tokenizer=False, target="cuda", precision=precision))
    (parity,) = opened.manifest.parity["tasks"].values()
    assert parity["greedy_tokens_equal"]
    assert 0 < parity["error"] <= parity["limit"]


def test_with_and_without_cuda_graphs_answers_are_alike(bundle):
    plain, captured = (prefix_runtime.load(bundle, provider=Cuda(uses_graphs=uses)) for uses in (False, True))
    for request in requests(8):
        assert agree(plain, request, answer(captured, *request), answer(plain, *request))


def test_a_batch_answers_as_its_rows_alone(bundle):
    engine = prefix_runtime.load(bundle, provider="cuda", max_batch=8)
    prompts, tasks = zip(*requests(8), strict=True)
    counts = [3, NEW, 9, 1, 17, NEW, 5, 12]
    together = engine.generate(token_ids=list(prompts), task=list(tasks), max_new_tokens=counts, ignore_end=True)
    for result, *request, count in zip(together, prompts, tasks, counts, strict=True):
        assert agree(engine, request, result.token_ids, answer(engine, *request)[:count])


def test_beams_are_those_of_the_host(bundle):
    # In float16 two texts may be as likely as each other, so only scores are compared.
    engine, plain = (prefix_runtime.load(bundle, provider=provider) for provider in ("cuda", "cpu"))
    prompts, tasks = zip(*requests(8), strict=True)
    options = {"task": list(tasks), "num_beams": 4, "max_new_tokens": NEW, "ignore_end": True}
    found, expected = (each.generate(token_ids=list(prompts), **options) for each in (engine, plain))
    scores = [[result.score for result in side] for side in (found, expected)]
    np.testing.assert_allclose(*scores, rtol=0, atol=TIE)


def test_many_threads_share_an_engine(bundle):
    engine = prefix_runtime.load(bundle, provider=Cuda(prefix_bytes=0))  # each request brings its prefix in
    given = requests(64)
    expected = [answer(engine, *request) for request in given]
    # All at once, so that some capture while others wait, take memory, free it, or bring a prefix in.
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        return [answer(engine, *request) for request in given[number::8]]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    for number in range(8):
        assert found[number] == expected[number::8]


def test_threads_that_come_and_go_leave_no_memory_behind(bundle):
    engine = prefix_runtime.load(bundle, provider="cuda")
    (request,) = requests(1)
    expected = answer(engine, *request)

    def in_a_thread():
        found = []
        thread = threading.Thread(target=lambda: found.append(answer(engine, *request)))
        thread.start()
        thread.join()
        return found[0]

    for _ in range(10):
        assert in_a_thread() == expected
    before = free_bytes()
    for _ in range(40):
        assert in_a_thread() == expected
    assert before - free_bytes() < 64 * MIB


def sessions():
    """How many sessions live on the GPU; each has a thread."""
    return sum(thread.name == "prefix-runtime-cuda" for thread in threading.enumerate())


def test_engines_that_are_let_go_of_leave_no_memory_behind(bundle):
    left = []
    gc.collect()
    before = sessions()
    for _ in range(6):
        engine = prefix_runtime.load(bundle, provider="cuda", cache_bytes=0)  # no buffer outlives its request
        for request in requests(4):
            answer(engine, *request)
        del engine
        gc.collect()
        while sessions() > before:  # each is closed by its own thread
            time.sleep(0.01)
        left.append(free_bytes())
    assert left[1] - left[-1] < 64 * MIB


def test_everything_is_ordered_on_the_applications_stream(bundle):
    stream = torch.cuda.Stream()
    other, engine = (prefix_runtime.load(bundle, provider=Cuda(stream=given)) for given in (None, stream.cuda_stream))
    matrix = torch.randn(4096, 4096, device="cuda")
    for request in requests(4):
        with torch.cuda.stream(stream):
            for _ in range(20):
                matrix = torch.tanh(matrix @ matrix)
        found = answer(engine, *request)
        assert stream.query()  # the answer came behind what the application had asked for
        assert agree(other, request, found, answer(other, *request))


def test_engines_take_turns_on_one_stream(bundle):
    stream = torch.cuda.Stream()
    alone = prefix_runtime.load(bundle, provider="cuda")
    given = requests(24)
    expected = [answer(alone, *request) for request in given]
    engines = [prefix_runtime.load(bundle, provider=Cuda(stream=stream.cuda_stream)) for _ in range(2)]
    # All at once: one captures, while the other has something to ask of the same stream.
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda engine: [answer(engine, *request) for request in given], engines):
            for request, ours, theirs in zip(given, found, expected, strict=True):
                assert agree(alone, request, ours, theirs)


def test_thousands_of_prefixes_are_resident_and_the_least_recently_used_brought_in(bundle):
    opened = Bundle.open(bundle)
    prefixes = [random_prefix(opened, 16, seed=seed) for seed in range(3000)]
    layers = prefixes[0].sites["decoder"]
    one = sum(2 * layer.key.size * 2 for layer in layers)  # float16
    engine = prefix_runtime.load(bundle, provider=Cuda(prefix_bytes=2000 * one))
    for index, prefix in enumerate(prefixes):
        engine.add_task(f"t{index}", prefix)
    first = [answer(engine, [5, 6, 7], f"t{index}")[:4] for index in range(3000)]
    assert engine._backend.prefixes.nbytes == 2000 * one
    for index in np.random.default_rng(0).permutation(3000)[:500].tolist():
        assert answer(engine, [5, 6, 7], f"t{index}")[:4] == first[index]
    assert len(set(map(tuple, first))) > 100  # the tasks differ


def test_each_gpu_has_an_engine_of_its_own(bundle):
    # On one GPU these are two engines of one process, which run at once too.
    devices = [index % torch.cuda.device_count() for index in range(2)]
    engines = [prefix_runtime.load(bundle, provider=Cuda(device=device)) for device in devices]
    given = requests(24)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda engine: [answer(engine, *request) for request in given], engines))
    for request, left, right in zip(given, *found, strict=True):
        assert agree(engines[0], request, left, right)
    assert torch.cuda.current_device() == 0  # as the application left it


def test_a_gpu_that_is_not_there_is_named(bundle):
    last = torch.cuda.device_count() - 1
    with pytest.raises(ProviderError, match=rf"^cuda: device: expected 0 to {last}, found 99$"):
        prefix_runtime.load(bundle, provider=Cuda(device=99))


def test_a_limit_that_the_weights_exceed_is_one_clear_line(bundle):
    with pytest.raises(ProviderError, match=r"model\.onnx: onnxruntime \S+ cannot (open|run) the graph: .*"):
        answer(prefix_runtime.load(bundle, provider=Cuda(memory_limit=1)), [5, 6], None)


def test_sampled_rows_answer_alike_under_their_seed(bundle):
    engine = prefix_runtime.load(bundle, provider="cuda")
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=7)
    first, second = (answer(engine, [5, 6, 7], "p20", sampling=sampling) for _ in range(2))
    assert first == second


def test_a_step_is_captured_once_for_each_length_and_number_of_rows(bundle, monkeypatch):
    bound = []
    make = CudaCache._bound_step
    monkeypatch.setattr(CudaCache, "_bound_step", lambda cache, rows: (bound.append(rows), make(cache, rows))[1])
    engine = prefix_runtime.load(bundle, provider="cuda")
    for request in requests(12):
        answer(engine, *request)
    assert bound == [1]


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("generate", ["the quick", "--task", "p3"]),
        ("bench", ["--rounds", "6", "--prefix-length", "0", "--prefix-length", "5"]),
    ],
)
def test_the_commands_run_there(bundle, verb, options):
    result = CliRunner().invoke(main, [verb, str(bundle), "--provider", "cuda", *options])
    assert result.exit_code == 0, result.output
    assert ("NVIDIA" in result.output) == (verb == "bench")
