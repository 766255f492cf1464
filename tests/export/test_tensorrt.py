"""Engines of real graphs, built by TensorRT for RTX without a GPU: what is recorded, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import transformers
from click.testing import CliRunner

from prefix_export.build import BuildRequest, build
from prefix_export.cli import main as cli
from prefix_export.errors import EngineError
from prefix_export.tensorrt.request import TensorRTEngineRequest
from prefix_export.tensorrt.tensorrt_engine import build_tensorrt_engine, find_tensorrt_engine
from prefix_runtime import Bundle, BundleError, BundleIntegrityError, ProviderError, RequestError
from prefix_runtime.backends.tensorrt.library import Library
from prefix_runtime.backends.tensorrt.tensorrt_engine_file import read_tensorrt_engines, tensorrt_engines_folder
from prefix_runtime.bundle.folder import MANIFEST_NAME, describe_file
from prefix_runtime.interrupts import ending_when_stopped
from tests.export.conftest import RecordedProgress
from tests.workshop import with_families

pytestmark = pytest.mark.tensorrt
SMALL = {"max_batch": 2, "max_prompt": 8}
COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@pytest.fixture(scope="module")
def fed(workshop):
    """A bundle that feeds a prefix of 3 to a GPT-2 of 3 layers, 4 heads of 16, context 320; not to be changed."""
    return workshop.bundle("gpt2", (3,), tokenizer=False, target="tensorrt", verify=False)


@pytest.fixture
def own(fed, tmp_path):
    """A copy of it, to be changed and broken."""
    return shutil.copytree(fed, tmp_path / "own")


@pytest.fixture(scope="module")
def library():
    return Library("tensorrt-rtx")


@pytest.fixture
def change_graph():
    """Edits a bundle's graph, and lets the manifest know."""

    def change(bundle, edit):
        path = bundle / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        edit(model.graph)
        path.write_bytes(model.SerializeToString())
        manifest = json.loads((bundle / MANIFEST_NAME).read_text())
        entry = describe_file(bundle, "model.onnx")
        for listed in manifest["files"]:
            if listed["path"] == entry.path:
                listed.update(size=entry.size, sha256=entry.sha256)
        (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))

    return change


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def edit_manifest(bundle, edit):
    content = json.loads((bundle / MANIFEST_NAME).read_text())
    edit(content)
    (bundle / MANIFEST_NAME).write_text(json.dumps(content))


def described(values):
    """Names, numpy types and shapes, -1 for what varies, as the ONNX file has them."""
    found = set()
    for value in values:
        tensor = value.type.tensor_type
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        found.add((value.name, dtype, tuple(size.dim_value or -1 for size in tensor.shape.dim)))
    return found


def test_an_engine_for_two_compute_capabilities_takes_and_gives_what_the_graph_does(fed, tmp_path, library):
    result = build_tensorrt_engine(
        TensorRTEngineRequest(fed, tmp_path / "engines", compute_capabilities=("8.6", "12.0"), max_prefix=5)
    )
    (record,) = read_tensorrt_engines(tmp_path / "engines")
    assert record == result.record
    assert record.compute_capabilities == ("8.6", "12.0")
    assert (record.backend, record.version) == ("tensorrt-rtx", library.version)
    graph = onnx.load(fed / "model.onnx", load_external_data=False).graph
    assert {(each.name, each.dtype, each.shape) for each in record.inputs} == described(graph.input)
    assert {(each.name, each.dtype, each.shape) for each in record.outputs} == described(graph.output)
    prefill, decode = record.profiles
    assert prefill.inputs["input_ids"] == ((1, 1), (1, 160), (1, 319))
    assert prefill.inputs["past_key_values.2.value"] == ((1, 4, 0, 16), (1, 4, 5, 16), (1, 4, 5, 16))
    assert prefill.inputs["attention_mask"] == ((1, 1), (1, 165), (1, 324))
    assert prefill.inputs["num_logits_to_keep"] == ((1,), (1,), (319,))
    assert decode.inputs["input_ids"] == ((1, 1), (1, 1), (8, 1))
    assert decode.inputs["past_key_values.0.key"] == ((1, 4, 1, 16), (1, 4, 160, 16), (8, 4, 319, 16))
    assert decode.inputs["attention_mask"] == ((1, 2), (1, 161), (8, 320))
    content = (result.folder / record.file.path).read_bytes()
    assert all(name.encode() in content for name, *_ in described((*graph.input, *graph.output)))


@pytest.mark.parametrize(
    "capabilities", with_families([COMPUTE_CAPABILITIES], [(each,) for each in COMPUTE_CAPABILITIES])
)
def test_a_float16_engine_is_built_for_each_compute_capability(workshop, tmp_path, capabilities):
    bundle = workshop.bundle("gpt2", (3,), tokenizer=False, target="tensorrt", precision="fp16", verify=False)
    build_tensorrt_engine(
        TensorRTEngineRequest(bundle, tmp_path / "engines", compute_capabilities=capabilities, **SMALL)
    )
    (record,) = read_tensorrt_engines(tmp_path / "engines")
    assert record.compute_capabilities == capabilities
    assert {each.dtype for each in record.inputs if each.name.startswith("past")} == {"float16"}


def test_it_lies_in_the_bundle_which_opens_as_before(own):
    before = Bundle.open(own)
    build_tensorrt_engine(TensorRTEngineRequest(own, **SMALL))
    opened = Bundle.open(own)
    opened.verify()
    assert opened.manifest == before.manifest
    assert {path.suffix for path in (own / "tensorrt").iterdir()} == {".json", ".engine"}


def test_what_was_built_is_not_built_again_and_other_choices_take_its_place(fed, tmp_path):
    folder = tmp_path / "engines"
    first = build_tensorrt_engine(TensorRTEngineRequest(fed, folder, compute_capabilities=("8.9",), **SMALL))
    told = RecordedProgress()
    again = build_tensorrt_engine(TensorRTEngineRequest(fed, folder, compute_capabilities=("8.9",), **SMALL), told)
    assert (again.record, again.seconds, told.phases) == (first.record, 0.0, [])
    other = build_tensorrt_engine(
        TensorRTEngineRequest(fed, folder, compute_capabilities=("8.9",), max_batch=3, max_prompt=8)
    )
    assert read_tensorrt_engines(folder) == [other.record]
    assert {path.name for path in folder.iterdir()} == {"engines.json", other.record.file.path}
    beside = build_tensorrt_engine(TensorRTEngineRequest(fed, folder, compute_capabilities=("12.0",), **SMALL))
    assert {record.name for record in read_tensorrt_engines(folder)} == {"tensorrt-rtx-8.9", "tensorrt-rtx-12.0"}
    bundle = Bundle.open(fed)
    assert find_tensorrt_engine(folder, bundle, "tensorrt-rtx-12.0") == beside.record
    with pytest.raises(EngineError, match=r"expected one engine, found tensorrt-rtx-12.0, tensorrt-rtx-8.9; name one"):
        find_tensorrt_engine(folder, bundle)


def test_phases_are_told_while_it_builds(fed, tmp_path):
    told = RecordedProgress()
    build_tensorrt_engine(TensorRTEngineRequest(fed, tmp_path / "engines", **SMALL), told)
    assert told.phases[0] == "parse the graph"
    assert "TensorRT: building engine" in told.phases
    assert told.phases[-1] == "write the engine"
    assert len(told.phases) < 40, "a person could not follow"


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_stops_the_build_and_leaves_what_was_there(fed, tmp_path, number, is_first):
    if not is_first:
        build_tensorrt_engine(TensorRTEngineRequest(fed, tmp_path / "engines", **SMALL | {"max_batch": 3}))
    before = contents(tmp_path)

    class Interrupting(RecordedProgress):
        def phase(self, name, total=None, **options):
            super().phase(name, total, **options)
            if name == "TensorRT: building engine":
                os.kill(os.getpid(), number)

    told = Interrupting()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ending_when_stopped(), pytest.raises(SystemExit):
            build_tensorrt_engine(TensorRTEngineRequest(fed, tmp_path / "engines", **SMALL), told)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "write the engine" not in told.phases
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"compute_capabilities": ("9.0",)},
            EngineError,
            "expected one of 7.5, 8.0, 8.6, 8.9, 12.0, 12.1.*found '9.0'",
        ),
        ({"compute_capabilities": ("8.6", "8.6")}, EngineError, "compute capability: expected each once"),
        ({"compute_capabilities": ("7.5",)}, EngineError, "7.5: expected a graph in float16.*--precision fp16"),
        ({"precision": "fp16"}, EngineError, "precision fp16: expected none, as TensorRT for RTX.*types of the graph"),
        ({"precision": "int8"}, EngineError, "expected one of fp16, bf16, found 'int8'; for weights of 8 bits build"),
        (
            {"is_refittable": True},
            EngineError,
            "refit: expected a bundle whose graph holds prefixes .*, found one that feeds them",
        ),
        ({"backend": "onnx"}, EngineError, "backend: expected one of tensorrt-rtx, tensorrt, found 'onnx'"),
        ({"max_prefix": 2}, RequestError, "max_prefix: expected 3 or more, the length of the task 'p3', found 2"),
        ({"max_prefix": 319}, RequestError, "max_prefix: expected 0 to 318, found 319"),
        ({"max_prompt": 0}, RequestError, "max_prompt: expected 1 to 319, found 0"),
        ({"max_batch": 0}, RequestError, "max_batch: expected 1 to 4096, found 0"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_cannot_be_built_is_refused_and_nothing_written(fed, tmp_path, monkeypatch, given, error, message):
    monkeypatch.setattr(Library, "has_gpu", False)
    with pytest.raises(error, match=message):
        build_tensorrt_engine(TensorRTEngineRequest(fed, tmp_path / "engines", **given))
    assert not list(tmp_path.iterdir())


def test_prefixes_that_may_be_replaced_are_prepared_on_a_gpu_alone(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(Library, "has_gpu", False)
    baked = workshop.bundle("gpt2", (3,), tokenizer=False, mode="bake", verify=False)
    with pytest.raises(EngineError, match=r"^refit: .* on a GPU: expected one on this machine, found none; build "):
        build_tensorrt_engine(TensorRTEngineRequest(baked, tmp_path / "engines", is_refittable=True))
    assert not list(tmp_path.iterdir())


def test_who_looks_for_an_engine_where_there_is_none_is_told_how_to_build_one(own):
    bundle = Bundle.open(own)
    expected = rf"^{own}/tensorrt: expected one engine, found none; build it with: prefix-export tensorrt {own}$"
    with pytest.raises(EngineError, match=expected):
        find_tensorrt_engine(tensorrt_engines_folder(bundle), bundle)


@pytest.mark.families
def test_a_graph_that_was_rounded_for_others_is_refused(workshop, tmp_path):
    bundle = workshop.bundle("gpt2", (3,), tokenizer=False, target="portable", precision="int8", verify=False)
    expected = r"^TensorRT: expected a graph in fp32 or fp16, or in int8 for it, found one in int8 for portable; build "
    with pytest.raises(BundleError, match=expected):
        build_tensorrt_engine(TensorRTEngineRequest(bundle, tmp_path / "engines", **SMALL))
    assert not list(tmp_path.iterdir())


def test_a_graph_of_8_bits_is_computed_in_its_own_types(workshop, tmp_path):
    bundle = workshop.bundle("gpt2", (3,), tokenizer=False, target="tensorrt", precision="int8", verify=False)
    library = Library("tensorrt-rtx")
    library.api = SimpleNamespace(**vars(library.api))
    library.api.BuilderFlag = SimpleNamespace(FP16=0)  # as TensorRT had before 11
    with pytest.raises(EngineError, match=r"^precision: expected none for a graph whose weights have 8 .*'fp16'$"):
        build_tensorrt_engine(
            TensorRTEngineRequest(bundle, tmp_path / "engines", precision="fp16", **SMALL), library=library
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", with_families(["gpt2"], ["llama"]))
def test_weights_of_8_bits_stay_so_in_an_engine(tmp_path, architecture):
    sizes = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16, "vocab_size": 384}
    config = transformers.AutoConfig.for_model(architecture, **sizes, bos_token_id=0, eos_token_id=0)
    if architecture == "llama":  # products of one activation, some of one size
        config.update({"num_key_value_heads": 4, "intermediate_size": 4096, "max_position_embeddings": 64})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    found = {}
    for precision in ("fp16", "int8"):
        request = BuildRequest(
            str(tmp_path / "model"), {}, tmp_path / precision, target="tensorrt", precision=precision, verify=False
        )
        bundle = build(request).bundle
        weights = bundle.manifest.files["model.onnx.data"].size
        found[precision] = weights, build_tensorrt_engine(TensorRTEngineRequest(bundle.root, **SMALL)).record.file.size
    saved, less = (before - after for before, after in zip(*found.values(), strict=True))
    assert saved > 10e6
    assert less > 0.9 * saved


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_graph_that_was_damaged_is_built_of_no_more(own, name):
    path = own / name
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=rf"{name}: expected SHA-256"):
        build_tensorrt_engine(TensorRTEngineRequest(own, **SMALL))
    assert not tensorrt_engines_folder(Bundle.open(own)).exists()


def test_a_timing_cache_of_a_builder_that_measures_nothing_is_refused_and_left_as_it_is(fed, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    with pytest.raises(EngineError, match=rf"^timing cache: expected none, .* measures nothing .*, found {note}$"):
        build_tensorrt_engine(TensorRTEngineRequest(fed, tmp_path / "other", timing_cache=note, **SMALL))
    assert note.read_text() == "mine"
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("option", ["output", "timing_cache"])
def test_a_place_that_cannot_be_written_is_refused_at_once(fed, tmp_path, option):
    told = RecordedProgress()
    with pytest.raises(EngineError, match=r"nowhere: expected a folder to write into, found none"):
        build_tensorrt_engine(TensorRTEngineRequest(fed, **{option: tmp_path / "nowhere" / "x"}, **SMALL), told)
    assert not told.phases


def test_an_engine_is_the_same_however_its_gpus_are_listed():
    first, second = (
        TensorRTEngineRequest(None, compute_capabilities=each) for each in (("8.6", "12.0"), ("12.0", "8.6"))
    )
    assert first.name == second.name == "tensorrt-rtx-8.6-12.0"
    assert first.options() == second.options()


@pytest.mark.parametrize(
    ("backend", "module", "hint"),
    [("tensorrt", "tensorrt", "pip install tensorrt"), ("tensorrt-rtx", "tensorrt_rtx_bindings", "tensorrt-rtx]")],
)
def test_a_missing_library_is_named_with_what_to_install(fed, tmp_path, monkeypatch, backend, module, hint):
    for name in (module, "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ProviderError, match=rf"{backend}: expected TensorRT.*Python bindings, found none") as caught:
        build_tensorrt_engine(TensorRTEngineRequest(fed, tmp_path / "engines", backend=backend))
    assert hint in str(caught.value)


def test_an_operator_that_tensorrt_does_not_know_is_named(own, change_graph):
    def rename(graph):
        node = next(node for node in graph.node if node.op_type == "Softmax")
        node.op_type, node.name = "Bernoulli", "the_node"

    change_graph(own, rename)
    with pytest.raises(EngineError, match=r"does not take the graph: node 'the_node' \(Bernoulli\): "):
        build_tensorrt_engine(TensorRTEngineRequest(own, **SMALL))


def test_a_graph_that_is_not_the_manifests_is_refused(own):
    def halve(content):
        content["geometry"]["sites"]["decoder"][1]["head_dim"] = 8

    edit_manifest(own, halve)
    with pytest.raises(
        ProviderError,
        match=r"past_key_values.1.key: expected float32 \[\?, 4, \?, 8\], found float32 \[\?, 4, \?, 16\]",
    ):
        build_tensorrt_engine(TensorRTEngineRequest(own, **SMALL))


def test_a_graph_of_the_fast_flavour_is_refused(own):
    edit_manifest(own, lambda content: content.update(flavour="fast"))
    with pytest.raises(BundleError, match=r"expected a graph in standard operators, found .*--target tensorrt"):
        build_tensorrt_engine(TensorRTEngineRequest(own))


def test_a_graph_that_takes_prefixes_apart_is_refused(own):
    (own / "p3.onnx_adapter").write_bytes(b"adapter")
    entry = describe_file(own, "p3.onnx_adapter")
    edit_manifest(own, lambda content: content["files"].append(vars(entry)))
    with pytest.raises(EngineError, match="expected a bundle without adapter files"):
        build_tensorrt_engine(TensorRTEngineRequest(own, **SMALL))


@pytest.fixture
def with_engine(own):
    """A bundle of one's own with an engine."""
    build_tensorrt_engine(TensorRTEngineRequest(own, **SMALL))
    return own


def test_an_engine_of_another_graph_is_stale(with_engine, change_graph):
    folder = tensorrt_engines_folder(Bundle.open(with_engine))

    def touch(graph):
        graph.doc_string = "another graph"

    change_graph(with_engine, touch)
    with pytest.raises(BundleError, match="expected one of this bundle's graph, found one that was built of another; "):
        find_tensorrt_engine(folder, Bundle.open(with_engine))
    build_tensorrt_engine(TensorRTEngineRequest(with_engine, **SMALL))
    assert find_tensorrt_engine(folder, Bundle.open(with_engine)).name == "tensorrt-rtx"


def test_a_damaged_engine_or_record_is_refused(with_engine):
    bundle = Bundle.open(with_engine)
    folder = tensorrt_engines_folder(bundle)
    (record,) = read_tensorrt_engines(folder)
    (folder / record.file.path).write_bytes(b"vtrt")
    with pytest.raises(BundleIntegrityError, match="the engine was changed or damaged"):
        find_tensorrt_engine(folder, bundle)
    build_tensorrt_engine(TensorRTEngineRequest(with_engine, **SMALL))  # as the message says
    assert find_tensorrt_engine(folder, bundle).name == record.name
    content = json.loads((folder / "engines.json").read_text())
    content["engines"][0]["file"]["path"] = "../model.onnx"
    (folder / "engines.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"expected a relative path inside the bundle, found '../model.onnx'"):
        find_tensorrt_engine(folder, bundle)
    del content["engines"][0]["profiles"]
    (folder / "engines.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"engines.json: expected a record of engines, found one that is damaged"):
        find_tensorrt_engine(folder, bundle)


def test_the_command_says_what_was_built_and_that_it_is_there(fed, tmp_path):
    arguments = ["tensorrt", fed, "--output", tmp_path / "engines", "--compute-capability", "8.6", "--max-prompt", "8"]
    done = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert "built by            tensorrt-rtx 1.7" in done.output
    assert "prompts             of 1 to 8 tokens" in done.output
    assert "decode steps        of 1 to 8 rows, 320 positions" in done.output
    again = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert again.output.endswith("is up to date\n")
    wrong = CliRunner().invoke(cli.main, [*map(str, arguments), "--compute-capability", "9.0"])
    assert wrong.exit_code == 1
    assert wrong.output.startswith("Error: compute capability: expected one of 7.5")
    assert wrong.output.count("\n") == 1
