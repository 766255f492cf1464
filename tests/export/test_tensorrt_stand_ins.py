"""What needs a GPU, against stand-ins of TensorRT: its own builder, engines read back, another prefix in an engine."""

from __future__ import annotations

import enum
import json
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prefix_export.cli import main as cli
from prefix_export.errors import EngineError
from prefix_export.prefixes.fold import fold_for_bundle
from prefix_export.tensorrt import refit
from prefix_export.tensorrt.refit import mark_prefixes, prefix_weights, refit_tensorrt_engine
from prefix_export.tensorrt.request import TensorRTEngineRequest
from prefix_export.tensorrt.tensorrt_engine import build_tensorrt_engine
from prefix_runtime import Bundle, PrefixMismatchError, ProviderError, UnknownTaskError
from prefix_runtime.backends.tensorrt.library import Library
from prefix_runtime.backends.tensorrt.profile import tensors
from prefix_runtime.backends.tensorrt.tensorrt_engine_file import read_tensorrt_engines
from prefix_runtime.bundle.graph_contract import NUM_LOGITS_TO_KEEP

PROMPT = [5, 9, 2, 41]
_TYPES = {"int64": "INT64", "float32": "FLOAT"}


@pytest.fixture(scope="module")
def bundle(workshop):
    """A GPT-2 that holds a prefix of 3; not to be changed."""
    return Bundle.open(workshop.bundle("gpt2", (3,), tokenizer=False, target="tensorrt", mode="bake", verify=False))


@pytest.fixture(scope="module")
def other_adapter(workshop):
    """Another adapter of the same length."""
    return workshop.adapter(workshop.model("gpt2"), 3, seed=1)


@pytest.fixture(scope="module")
def other(bundle, other_adapter):
    return fold_for_bundle(other_adapter, bundle)[0]


def test_the_weights_of_another_prefix_make_the_graph_answer_as_peft_does_with_it(
    bundle, other, workshop, other_adapter
):
    found = refit._weights(bundle, "p3", other)
    model = onnx.load(bundle.graph_path)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, array in found.items():
        assert numpy_helper.to_array(held[name]).shape == array.shape
        held[name].CopyFrom(numpy_helper.from_array(array, name))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.array([PROMPT])
    past = {f"past_key_values.{layer}.{part}": np.zeros((1, 4, 0, 16), np.float32)
            for layer in range(3) for part in ("key", "value")}  # fmt: skip
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(4)[None], **past}
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workshop.model("gpt2")), other_adapter).eval()
    with torch.no_grad():
        expected = peft(torch.from_numpy(ids), attention_mask=torch.ones(1, 4, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(session.run(["logits"], feeds)[0], expected, rtol=0, atol=1e-4)


def test_a_network_without_such_a_weight_is_refused(bundle):
    marked = []
    mark_prefixes(
        SimpleNamespace(mark_weights_refittable=lambda name: marked.append(name) is None), prefix_weights(bundle)
    )
    assert len(set(marked)) == 6
    with pytest.raises(EngineError, match=r"refit: 0.key: expected a weight .* of the network, found none"):
        mark_prefixes(SimpleNamespace(mark_weights_refittable=lambda name: False), prefix_weights(bundle))


class Config:
    def __init__(self):
        self.flags, self.profiles, self.cache, self.progress_monitor = set(), [], None, None

    def set_flag(self, flag):
        self.flags.add(flag)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content):
        return None if content == b"damaged" else content

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return not ignore_mismatch

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: self.cache + b"+1")


class Profile:
    def __init__(self):
        self.ranges = {}

    def set_shape(self, name, *shapes):
        self.ranges[name] = shapes

    set_shape_input = set_shape

    def get_shape(self, name):
        return self.ranges[name]

    get_shape_input = get_shape


class Network:
    def __init__(self, given, made, flags):
        self._given, self._made, self.flags, self.refittable = given, made, flags, []
        self.num_inputs, self.num_outputs = len(given), len(made)

    def get_input(self, index):
        return self._tensor(self._given[index])

    def get_output(self, index):
        return self._tensor(self._made[index])

    def mark_weights_refittable(self, name):
        self.refittable.append(name)
        return True

    @staticmethod
    def _tensor(each):
        return SimpleNamespace(name=each.name, dtype=SimpleNamespace(name=_TYPES[each.dtype]), shape=each.shape)


class Engine:
    """What a builder made, as an `ICudaEngine` is asked."""

    def __init__(self, network, config):
        self._profiles = config.profiles
        given = [network.get_input(index) for index in range(network.num_inputs)]
        made = [network.get_output(index) for index in range(network.num_outputs)]
        self._inputs = {each.name for each in given}
        self._all = {each.name: each for each in (*given, *made)}
        self.num_io_tensors, self.num_optimization_profiles = len(self._all), len(self._profiles)

    def get_tensor_name(self, index):
        return list(self._all)[index]

    def get_tensor_dtype(self, name):
        return self._all[name].dtype

    def get_tensor_shape(self, name):
        return self._all[name].shape

    def get_tensor_mode(self, name):
        return "in" if name in self._inputs else "out"

    def get_tensor_profile_shape(self, name, place):
        return self._profiles[place].ranges[name]

    def get_tensor_profile_values(self, place, name):
        return self._profiles[place].ranges[name]

    def create_serialization_config(self):
        return Config()

    def serialize_with_config(self, config):
        assert config.flags == {"INCLUDE_REFIT"}
        return b"refitted"


class Refitter:
    """Takes the weights of `names`."""

    names, missing, done = frozenset(), (), []

    def __init__(self, engine, logger):
        self.engine, self.logger, self.given = engine, logger, {}

    def set_named_weights(self, name, weights):
        self.given[name] = weights
        return name in self.names

    def get_missing_weights(self):
        return list(self.missing)

    def refit_cuda_engine(self):
        Refitter.done = [self.given]
        return True


def stand_in(bundle, *flags):
    """TensorRT's bindings, of one engine; `made` holds what was made of them."""
    given, produced = tensors(bundle.manifest)
    made = SimpleNamespace(network=None, config=None, engine=None)

    class Builder:
        def __init__(self, logger):
            pass

        def create_network(self, creation_flags):
            made.network = Network(given, produced, creation_flags)
            return made.network

        def create_builder_config(self):
            made.config = Config()
            return made.config

        def create_optimization_profile(self):
            return Profile()

        def build_serialized_network(self, network, config):
            config.progress_monitor.phase_start("Building", None, 2)
            for step in range(2):
                if not config.progress_monitor.step_complete("Building", step):
                    return None
            config.progress_monitor.phase_finish("Building")
            made.engine = Engine(network, config)
            return " ".join(each.name for each in (*given, *produced)).encode()

    api = SimpleNamespace(
        __version__="10.9",
        ILogger=type("ILogger", (), {"Severity": SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)}),
        IProgressMonitor=object,
        Builder=Builder,
        BuilderFlag=SimpleNamespace(**{flag: flag for flag in flags}),
        NetworkDefinitionCreationFlag=enum.Enum("Flag", {"STRONGLY_TYPED": "1"}, type=int),
        OnnxParser=lambda network, logger: SimpleNamespace(parse=lambda content, path: True),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda content: made.engine),
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        Refitter=Refitter,
        Weights=lambda array: array,
        SerializationFlag=SimpleNamespace(INCLUDE_REFIT="INCLUDE_REFIT"),
    )
    return api, made


@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.setattr(Library, "has_gpu", True)


def build(bundle, folder, api, **options):
    return build_tensorrt_engine(
        TensorRTEngineRequest(bundle.root, folder, backend="tensorrt", **options), library=Library("tensorrt", api)
    )


@pytest.mark.usefixtures("with_gpu")
def test_on_a_gpu_the_engine_itself_is_read_back(bundle, tmp_path):
    api, made = stand_in(bundle)
    record = build(bundle, tmp_path / "engines", api).record
    assert (record.read_back, record.name, record.version) == ("engine", "tensorrt", "10.9")
    assert record.inputs == tensors(bundle.manifest)[0]
    assert record.profiles[1].inputs["attention_mask"] == ((1, 2), (1, 160), (8, 317))
    assert made.network.flags == 2  # 1 << STRONGLY_TYPED
    assert read_tensorrt_engines(tmp_path / "engines") == [record]


@pytest.mark.usefixtures("with_gpu")
def test_an_engine_for_another_gpu_is_built_anew(bundle, tmp_path, monkeypatch):
    api, _ = stand_in(bundle)
    found = []
    for capability in ("9.0", "9.0", "10.0"):
        monkeypatch.setattr("prefix_export.tensorrt.tensorrt_engine.gpu_capability", lambda index: capability)  # noqa: B023
        result = build(bundle, tmp_path / "engines", api)
        found.append((result.record.compute_capabilities, result.seconds > 0))
    assert found == [(("9.0",), True), (("9.0",), False), (("10.0",), True)]
    assert [record.compute_capabilities for record in read_tensorrt_engines(tmp_path / "engines")] == [("10.0",)]


@pytest.mark.usefixtures("with_gpu")
def test_an_engine_that_was_built_otherwise_than_told_is_refused(bundle, tmp_path):
    api, made = stand_in(bundle)

    def other(_):
        made.engine._profiles[0].ranges[NUM_LOGITS_TO_KEEP] = ((1,), (1,), (2,))
        return made.engine

    api.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=other)
    with pytest.raises(
        ProviderError, match=r"the engine: profile prefill: num_logits_to_keep: expected .*316,\)\), found"
    ):
        build(bundle, tmp_path / "engines", api)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("with_gpu")
def test_precision_is_tensorrts_to_choose_where_it_may(bundle, tmp_path):
    api, made = stand_in(bundle, "FP16", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")
    build(bundle, tmp_path / "engines", api, precision="fp16", is_version_compatible=True)
    assert made.network.flags == 0
    assert made.config.flags == {"FP16", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}
    with pytest.raises(EngineError, match=r"precision bf16: expected none, as TensorRT 10.9 computes in the types"):
        build(bundle, tmp_path / "engines", api, precision="bf16")


@pytest.mark.usefixtures("with_gpu")
def test_what_was_measured_is_kept_for_the_next_build(bundle, tmp_path):
    cache = tmp_path / "timing"
    for batch, expected in ((1, b"+1"), (2, b"+1+1")):
        build(bundle, tmp_path / "engines", stand_in(bundle)[0], timing_cache=cache, max_batch=batch)
        assert cache.read_bytes() == expected
    cache.write_bytes(b"damaged")
    with pytest.raises(EngineError, match=r"timing: expected a timing cache of TensorRT 10.9, found none"):
        build(bundle, tmp_path / "engines", stand_in(bundle)[0], timing_cache=cache)


@pytest.mark.usefixtures("with_gpu")
def test_tensorrt_takes_no_other_compute_capability_than_the_machines(bundle, tmp_path):
    with pytest.raises(
        EngineError, match=r"expected none, as TensorRT 10.9 builds for the GPU of this machine, found 8.6"
    ):
        build(bundle, tmp_path / "engines", stand_in(bundle)[0], compute_capabilities=("8.6",))


def test_tensorrt_without_a_gpu_is_told_what_needs_none(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(Library, "has_gpu", False)
    with pytest.raises(EngineError, match=r"expected a GPU on this machine.*take --backend tensorrt-rtx"):
        build(bundle, tmp_path / "engines", stand_in(bundle)[0])


@pytest.fixture
def refittable(bundle, tmp_path, monkeypatch):
    """An engine that was built with --refit: its file, its record, its library."""
    monkeypatch.setattr(Library, "has_gpu", True)
    api, made = stand_in(bundle, "REFIT_INDIVIDUAL")
    result = build(bundle, tmp_path / "engines", api, is_refittable=True)
    assert made.config.flags == {"REFIT_INDIVIDUAL"}
    assert sorted(made.network.refittable) == sorted(result.record.refittable.values())
    return result.folder / result.record.file.path, result.record, Library("tensorrt", api)


def test_an_engine_is_copied_with_another_prefix(bundle, refittable, other, tmp_path, monkeypatch):
    engine, record, library = refittable
    monkeypatch.setattr(Refitter, "names", frozenset(record.refittable.values()))
    made = refit_tensorrt_engine(
        bundle, engine, record, task="p3", prefix=other, output=tmp_path / "out", library=library
    )
    assert (tmp_path / "out" / made.file.path).read_bytes() == b"refitted"
    assert read_tensorrt_engines(tmp_path / "out") == [made]
    assert list(made.options["refitted"]) == ["p3"]
    (given,) = Refitter.done
    layer = other.sites["decoder"][0]
    np.testing.assert_array_equal(given[record.refittable["0.value"]][0], layer.value)
    assert {given[record.refittable["0.key"]][0].shape} <= {layer.key.shape, layer.key.swapaxes(1, 2).shape}


def test_what_cannot_be_refitted_is_refused_and_nothing_written(
    bundle, refittable, other, make_other, tmp_path, monkeypatch
):
    engine, record, library = refittable
    given = {"task": "p3", "prefix": other, "output": tmp_path / "out", "library": library}
    with pytest.raises(UnknownTaskError, match="p9"):
        refit_tensorrt_engine(bundle, engine, record, **given | {"task": "p9"})
    with pytest.raises(PrefixMismatchError, match=r"expected a prefix of length 3 and position base 3.*found 5 and 5"):
        refit_tensorrt_engine(bundle, engine, record, **given | {"prefix": make_other(5)})
    with pytest.raises(EngineError, match=r"refit: weight .*: expected one that the engine takes"):
        refit_tensorrt_engine(bundle, engine, record, **given)
    monkeypatch.setattr(Refitter, "names", frozenset(record.refittable.values()))
    monkeypatch.setattr(Refitter, "missing", ("a bias",))
    with pytest.raises(EngineError, match=r"expected only prefixes to change, found other weights that must: a bias"):
        refit_tensorrt_engine(bundle, engine, record, **given)
    monkeypatch.setattr(Library, "has_gpu", False)
    with pytest.raises(
        EngineError, match=r"refit: TensorRT 10.9: expected a GPU that runs engine 'tensorrt', found none"
    ):
        refit_tensorrt_engine(bundle, engine, record, **given)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def make_other(bundle, workshop):
    def make(length):
        return fold_for_bundle(workshop.adapter(workshop.model("gpt2"), length), bundle)[0]

    return make


def test_the_command_refuses_an_engine_that_was_not_built_for_it(bundle, other_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(Library, "has_gpu", True)
    folder = tmp_path / "engines"
    build(bundle, folder, stand_in(bundle)[0])
    record = json.loads((folder / "engines.json").read_text())
    record["engines"][0]["backend"] = "tensorrt-rtx"
    (folder / "engines.json").write_text(json.dumps(record))
    monkeypatch.setattr("prefix_runtime.backends.tensorrt.library._import", lambda backend: stand_in(bundle)[0])
    arguments = [
        "tensorrt-refit",
        bundle.root,
        f"p3={other_adapter}",
        "--engines",
        folder,
        "--output",
        tmp_path / "out",
    ]
    done = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "engine 'tensorrt': expected one that was built with --refit, found one that was not" in done.output
