"""Serialized engines through TensorRT's API: a stand-in of it runs the bundle's graph on the CPU, by addresses.

Its memory is the host's, filled with NaN: what is read before it was written shows. Answers are compared with those of
the bundle under onnxruntime.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import sys
import threading
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

import prefix_runtime
from prefix_runtime import Bundle, BundleError, Cuda, ProviderError, RequestError
from prefix_runtime.backends.tensorrt import session as module
from prefix_runtime.backends.tensorrt.backend import TensorRT
from prefix_runtime.backends.tensorrt.engine_file import (
    TensorRTEngineRecord,
    add_tensorrt_engine,
    graph_hash,
    read_tensorrt_engines,
    tensorrt_engines_folder,
)
from prefix_runtime.backends.tensorrt.library import Library
from prefix_runtime.backends.tensorrt.profile import limits, profiles, tensors
from prefix_runtime.backends.tensorrt.session import open_tensorrt_engine
from prefix_runtime.bundle.manifest import FileEntry
from prefix_runtime.engine import Engine

VERSION = "1.0"
PLAN = b"a serialized engine"
PROMPT = [5, 9, 2, 41, 7]
_TYPES = {"tensor(int64)": ("INT64", np.int64), "tensor(float)": ("FLOAT", np.float32)}


class StandInStream:
    handle = 7

    def __init__(self):
        self.uploaded = self.downloaded = 0

    def upload(self, address, array):
        assert array.flags.c_contiguous
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        self.uploaded += array.nbytes

    def download(self, array, address):
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        self.downloaded += array.nbytes

    def copy_blocks(self, target, source, width, height, depth):
        for piece in range(height * depth):
            ctypes.memmove(target.address + piece * target.pitch, source.address + piece * source.pitch, width)

    def synchronize(self):
        pass


class StandInDevice:
    def __init__(self):
        self.stream, self._lock = StandInStream(), threading.RLock()
        self._held = []

    def turn(self):
        return self._lock

    def allocate(self, nbytes):
        array = np.full(max(nbytes, 1), 0xFF, np.uint8)
        self._held.append(array)
        return SimpleNamespace(address=array.ctypes.data, nbytes=nbytes)

    def pinned(self, shape, dtype):
        return np.full(shape, 99, dtype)


class StandInContext:
    """Runs the graph on what lies at addresses, within the ranges of a profile."""

    def __init__(self, engine):
        self._engine, self._shapes, self._addresses = engine, {}, {}
        self.place = None

    def set_optimization_profile_async(self, place, stream):
        assert stream == StandInStream.handle
        self.place = place
        return True

    def set_input_shape(self, name, shape):
        least, _, most = self._engine.profiles[self.place].inputs[name]
        self._shapes[name] = shape
        return len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream == StandInStream.handle
        feeds = {name: self._read(name, dtype) for name, (_, dtype, _) in self._engine.inputs.items()}
        kept = int(feeds["num_logits_to_keep"])
        assert 1 <= kept <= self._engine.profiles[self.place].inputs["num_logits_to_keep"][2][0]
        names = [each.name for each in self._engine.session.get_outputs()]
        for name, array in zip(names, self._engine.session.run(names, feeds), strict=True):
            ctypes.memmove(self._addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return True

    def _read(self, name, dtype):
        shape = self._shapes.get(name, ())
        found = np.empty(shape, dtype)
        ctypes.memmove(found.ctypes.data, self._addresses[name], found.nbytes)
        return found


class StandInEngine:
    def __init__(self, bundle, ranges):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(bundle.graph_path, options, providers=["CPUExecutionProvider"])
        self.profiles, self.num_optimization_profiles = ranges, len(ranges)
        given = [*self.session.get_inputs(), *self.session.get_overridable_initializers()]
        self.inputs = {each.name: self._tensor(each) for each in given}
        self.outputs = {each.name: self._tensor(each) for each in self.session.get_outputs()}
        self._all = self.inputs | self.outputs
        self.num_io_tensors = len(self._all)

    @staticmethod
    def _tensor(each):
        name, dtype = _TYPES[each.type]
        return name, dtype, tuple(size if isinstance(size, int) else -1 for size in each.shape)

    def get_tensor_name(self, index):
        return list(self._all)[index]

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self._all[name][0])

    def get_tensor_shape(self, name):
        return self._all[name][2]

    def get_tensor_mode(self, name):
        return "in" if name in self.inputs else "out"

    def get_tensor_location(self, name):
        return "host" if name == "num_logits_to_keep" else "device"

    def get_tensor_profile_shape(self, name, place):
        return [list(shape) for shape in self.profiles[place].inputs[name]]

    def get_tensor_profile_values(self, place, name):
        return [list(shape) for shape in self.profiles[place].inputs[name]]

    def create_execution_context(self):
        return StandInContext(self)


def stand_in(engine, version=VERSION):
    """The bindings' names that the runtime uses; an engine opens from `PLAN` alone."""

    class Logger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)

    class Runtime:
        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, content):
            if content != PLAN or engine is None:
                self._logger.log(1, "Error Code 1:\n  the plan is none")
                return None
            return engine

    return SimpleNamespace(
        __version__=version,
        ILogger=Logger,
        Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        TensorLocation=SimpleNamespace(HOST="host", DEVICE="device"),
    )


def record_of(bundle, ranges, **changes):
    inputs, outputs = tensors(bundle.manifest)
    fields = {
        "name": "tensorrt-rtx-8.6",
        "file": FileEntry("", 0, "0" * 64),
        "backend": "tensorrt-rtx",
        "version": VERSION,
        "compute_capabilities": ("8.6",),
        "graph": graph_hash(bundle.manifest),
        "options": {},
        "profiles": ranges,
        "inputs": inputs,
        "outputs": outputs,
        "refittable": {},
        "read_back": "network",
    }
    return TensorRTEngineRecord(**fields | changes)


@pytest.fixture(scope="module", params=["feed", "bake"])
def made(request, workshop, tmp_path_factory):
    """A bundle with an engine for 3 rows, prompts of 12 and 320 positions."""
    source = workshop.bundle("gpt2", (3, 20), tokenizer=False, target="tensorrt", mode=request.param, verify=False)
    bundle = Bundle.open(shutil.copytree(source, tmp_path_factory.mktemp("engine") / "bundle"))
    ranges = profiles(bundle.manifest, limits(bundle.manifest, batch=3, prompt=12))
    tensorrt_engines_folder(bundle).mkdir()
    add_tensorrt_engine(tensorrt_engines_folder(bundle), record_of(bundle, ranges), PLAN)
    return bundle, StandInEngine(bundle, ranges)


@pytest.fixture
def capability(monkeypatch):
    monkeypatch.setattr(module, "gpu_capability", lambda index: "8.6")


@pytest.fixture
def opened(made, monkeypatch):
    """Opens a bundle's engine by the stand-in."""
    monkeypatch.setattr(module, "gpu_capability", lambda index: "8.6")

    def open_it(**options):
        bundle, engine = made
        library = Library("tensorrt-rtx", stand_in(options.get("engine", engine), options.get("version", VERSION)))
        device = StandInDevice()
        session = open_tensorrt_engine(bundle, Cuda(), library, device)
        return Engine(
            bundle, TensorRT(bundle, session), bundle.manifest.max_length, max_batch=session.limits.batch
        ), device

    return open_it


@pytest.fixture(scope="module")
def reference(made):
    return prefix_runtime.load(made[0].root, threads=1)


def tasks_of(engine):
    return ["p3", "p20", *([None] if engine.bundle.manifest.mode == "feed" else [])]


@pytest.mark.parametrize("location", ["host", "device"])
def test_logits_are_the_graphs(opened, reference, monkeypatch, location):
    monkeypatch.setattr(StandInEngine, "get_tensor_location", lambda engine, name: location)  # of what is no tensor
    engine, _ = opened()
    for task in tasks_of(engine):
        expected = reference.logits(PROMPT, task)
        np.testing.assert_allclose(engine.logits(PROMPT, task), expected, rtol=0, atol=1e-5)


def test_greedy_tokens_are_the_graphs_the_second_time_too(opened, reference):
    engine, _ = opened()
    for _ in range(2):
        for task in tasks_of(engine):
            expected = reference.generate(token_ids=PROMPT, task=task, max_new_tokens=20).token_ids
            assert engine.generate(token_ids=PROMPT, task=task, max_new_tokens=20).token_ids == expected


def test_rows_of_several_tasks_leave_and_go_on_as_if_alone(opened, reference):
    engine, _ = opened()
    prompts, tasks = [PROMPT[:1], PROMPT, PROMPT[:3]], ["p3", "p20", "p3"]
    for lengths in ([4, 15, 9], [12, 3, 7], [5, 5, 5]):
        found = engine.generate(token_ids=prompts, task=tasks, max_new_tokens=lengths)
        for prompt, task, length, answer in zip(prompts, tasks, lengths, found, strict=True):
            alone = reference.generate(token_ids=prompt, task=task, max_new_tokens=length)
            assert answer.token_ids == alone.token_ids


def test_beams_are_the_graphs_and_at_most_as_many_as_rows(opened, reference):
    engine, _ = opened()
    for task in tasks_of(engine):
        options = {"task": task, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 14}
        found, expected = (each.generate(token_ids=PROMPT, **options).sequences for each in (engine, reference))
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        np.testing.assert_allclose(*([each.score for each in side] for side in (found, expected)), rtol=0, atol=1e-5)
    with pytest.raises(RequestError, match=r"^num_beams: expected at most 3, the rows that the provider runs together"):
        engine.generate(token_ids=PROMPT, task="p3", num_beams=4)


def test_a_token_takes_no_keys_and_values_to_the_gpu_or_back(opened):
    engine, device = opened()
    answer = engine.stream(token_ids=PROMPT, task="p20", max_new_tokens=8)
    next(answer)
    before = device.stream.uploaded, device.stream.downloaded
    next(answer)
    vocab = engine.bundle.manifest.geometry.vocab_size
    assert device.stream.downloaded - before[1] == 4 * vocab
    assert device.stream.uploaded - before[0] < 8 * (3 + engine.bundle.manifest.max_length)


def test_a_prompt_longer_than_the_profile_is_refused(opened):
    engine, _ = opened()
    with pytest.raises(RequestError, match=r"expected a prompt of at most 12 tokens.*found 13; .*--max-prompt"):
        engine.generate(token_ids=[1] * 13, task="p3", max_new_tokens=2)


def test_more_rows_than_the_profile_are_taken_in_turns_by_the_engine(opened, reference):
    engine, _ = opened()
    found = engine.generate(token_ids=[PROMPT] * 5, task="p3", max_new_tokens=4)
    assert {answer.token_ids for answer in found} == {
        reference.generate(token_ids=PROMPT, task="p3", max_new_tokens=4).token_ids
    }


def test_a_prefix_longer_than_the_profile_is_refused(opened, make_prefix):
    engine, _ = opened()
    if engine.bundle.manifest.mode == "bake":
        with pytest.raises(BundleError, match="whose graph holds them"):
            engine.add_task("long", make_prefix(30))
        return
    engine.add_task("long", make_prefix(30))
    with pytest.raises(RequestError, match=r"expected at most 20 positions before a prompt.*found 30; .*--max-prefix"):
        engine.generate(token_ids=PROMPT, task="long", max_new_tokens=2)


def test_an_engine_that_does_not_open_is_an_error_in_one_line(opened):
    with pytest.raises(ProviderError, match=r"cannot open the engine \(Error Code 1: the plan is none\)$"):
        opened(engine=None)


def test_an_engine_of_another_version_is_refused(opened):
    with pytest.raises(
        ProviderError, match=r"expected tensorrt-rtx 1.0, which built it, found 2.0; install that version"
    ):
        opened(version="2.0")


def test_an_engine_that_takes_something_else_is_refused(opened, made):
    _, engine = made
    other = StandInEngine(made[0], engine.profiles)
    other._all["logits"] = ("HALF", *other._all["logits"][1:])
    with pytest.raises(ProviderError, match=r"output logits: expected float32 \[\?, \?, 384\], found float16"):
        opened(engine=other)
    narrow = dataclasses.replace(engine.profiles[1], inputs={**engine.profiles[1].inputs, "input_ids": ((1, 1),) * 3})
    with pytest.raises(
        ProviderError, match=r"profile decode: input_ids: expected \(\(1, 1\), \(1, 1\), \(3, 1\)\), found"
    ):
        opened(engine=StandInEngine(made[0], (engine.profiles[0], narrow)))


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (None, r"expected GPU 0 and NVIDIA's driver, found none; install the driver, or take provider 'cpu'"),
        ("8.9", r"expected an engine for compute capability 8.9, found tensorrt-rtx-8.6; build one .* 8.9$"),
        ("9.0", r"compute capability 9.0, found .*; build one .* --backend tensorrt on this .* provider 'cuda'$"),
    ],
)
def test_a_machine_without_such_a_gpu_is_told_what_to_do(made, monkeypatch, capability, message):
    monkeypatch.setattr(module, "gpu_capability", lambda index: capability)
    with pytest.raises(ProviderError, match=message):
        prefix_runtime.load(made[0].root, provider="tensorrt-engine")


def test_an_engine_that_names_the_gpu_comes_before_one_that_does_not(made, capability, monkeypatch):  # noqa: ARG001
    bundle = made[0]
    named = read_tensorrt_engines(tensorrt_engines_folder(bundle))[0]
    other = dataclasses.replace(named, name="tensorrt", backend="tensorrt", compute_capabilities=())
    monkeypatch.setattr(module, "read_tensorrt_engines", lambda folder: [other, named])
    assert module._fitting(bundle, 0) == named


@pytest.mark.usefixtures("capability")
def test_a_missing_library_is_named_with_what_to_install(made, monkeypatch):
    for name in ("tensorrt_rtx_bindings", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ProviderError, match=r"tensorrt-rtx: expected TensorRT for RTX's Python bindings.*pip install"):
        prefix_runtime.load(made[0].root, provider="tensorrt-engine")


def test_a_bundle_without_an_engine_says_how_to_build_one(made, tmp_path):
    bundle = shutil.copytree(made[0].root, tmp_path / "bundle", ignore=shutil.ignore_patterns("tensorrt"))
    with pytest.raises(
        ProviderError, match=r"expected an engine in .*found none; build one with: prefix-export tensorrt"
    ):
        prefix_runtime.load(bundle, provider="tensorrt-engine")


def test_a_bundle_of_which_no_engine_is_made_says_so(shared_bundle):
    with pytest.raises(BundleError, match=r"expected a graph in standard operators.*with --target tensorrt"):
        prefix_runtime.load(shared_bundle, provider="tensorrt-engine")


@pytest.mark.usefixtures("capability")
def test_a_stale_engine_is_refused(made, tmp_path):
    bundle = Bundle.open(shutil.copytree(made[0].root, tmp_path / "bundle"))
    (record,) = read_tensorrt_engines(tensorrt_engines_folder(bundle))
    add_tensorrt_engine(tensorrt_engines_folder(bundle), dataclasses.replace(record, graph="0" * 64), PLAN)
    with pytest.raises(BundleError, match="expected one of this bundle's graph, found one that was built of another"):
        prefix_runtime.load(bundle.root, provider="tensorrt-engine")
