"""onnxruntime's adapter files: a program swaps tasks by them alone, and gets PEFT's tokens."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import prefix_runtime
from prefix_export import clients
from prefix_export.build import BuildRequest, build
from prefix_export.errors import ExportError, ParityError
from prefix_runtime import Bundle, BundleError
from prefix_runtime.backends.onnxruntime.adapter_files import save_adapter
from prefix_runtime.bench.request import BenchRequest
from prefix_runtime.bench.run import bench
from tests.workshop import with_families

LENGTHS = (3, 20)
PROMPT = np.random.default_rng(2).integers(1, 384, size=9).tolist()
STEPS = 12


@pytest.fixture(scope="module", params=with_families(["gpt2"], ["llama"]))
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def bundle(workshop, architecture):
    return Bundle.open(workshop.bundle(architecture, LENGTHS, adapters="onnx"))


def greedy(session, options):
    """New tokens of a client that begins with no past at all and passes on what comes back."""
    ids, past, found, length = np.array([PROMPT]), {}, [], 0
    names = [output.name.replace("present", "past_key_values") for output in session.get_outputs()[1:]]
    while len(found) < STEPS:
        positions = np.arange(length, length + ids.shape[1])[None]
        length += ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64), "position_ids": positions, **past}
        logits, *present = session.run(None, feeds, options)
        past = dict(zip(names, present, strict=True))
        found.append(int(logits[0, -1].argmax()))
        ids = np.array([found[-1:]])
    return found


@pytest.fixture(scope="module")
def session(bundle):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(bundle.graph_path, options, providers=["CPUExecutionProvider"])


def expected(workshop, architecture, length):
    model = AutoModelForCausalLM.from_pretrained(workshop.model(architecture))
    if length:
        model = PeftModel.from_pretrained(model, workshop.adapter(workshop.model(architecture), length))
    ids = torch.tensor([PROMPT])
    output = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False, pad_token_id=0
    )
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("length", [*LENGTHS, 0])
def test_an_active_adapter_is_the_task(workshop, architecture, bundle, session, length):
    options = ort.RunOptions()
    if length:
        adapter = ort.LoraAdapter()
        adapter.Load(str(bundle.root / "adapters" / f"p{length}.onnx_adapter"))
        options.add_active_adapter(adapter)
    assert greedy(session, options) == expected(workshop, architecture, length)


def test_nothing_but_tokens_mask_and_positions_has_to_be_given(session):
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask", "position_ids"]


def test_the_runtime_feeds_the_same_bundle(workshop, architecture, bundle):
    engine = prefix_runtime.load(bundle.root, threads=1)
    found = engine.generate(token_ids=PROMPT, task="p20", max_new_tokens=STEPS)
    assert list(found.token_ids) == expected(workshop, architecture, 20)


def test_adapters_are_among_the_files_that_are_verified(bundle):
    assert {"adapters/p20.onnx_adapter", "adapters/p3.onnx_adapter"} <= set(bundle.manifest.files)


def test_an_adapter_file_that_answers_otherwise_fails_the_build(workshop, tmp_path, monkeypatch):
    def save_zeros(path, tensors):
        save_adapter(path, {name: np.zeros_like(array) for name, array in tensors.items()})

    monkeypatch.setattr(clients, "save_adapter", save_zeros)
    model = workshop.model("gpt2")
    request = BuildRequest(str(model), {"p3": workshop.adapter(model, 3)}, tmp_path / "out", adapters="onnx")
    with pytest.raises(
        ParityError, match=r"^task 'p3': expected the graph with its adapter file to agree with .* apart$"
    ):
        build(request)
    assert not list(tmp_path.iterdir())


def test_tasks_do_not_change_without_their_adapters(bundle):
    for change in (lambda: bundle.remove_task("p3"), lambda: bundle.add_task("new", bundle.prefix("p3"))):
        with pytest.raises(BundleError, match="expected a bundle without adapter files"):
            change()


def test_an_engine_takes_more_tasks_in_memory_and_is_measured(bundle):
    engine = prefix_runtime.load(bundle.root, threads=1)
    engine.add_task("again", bundle.prefix("p20"))
    found = [engine.generate(token_ids=PROMPT, task=task, max_new_tokens=3).token_ids for task in ("p20", "again")]
    assert found[0] == found[1]
    report = bench(bundle.root, BenchRequest((0, 5), new_tokens=2, rounds=1, threads=1))
    assert {cell.label for cell in report.cells} == {"0", "5", "p20", "p3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": "onnx"}, "adapters: expected at least one prefix to write as an adapter file, found none"),
        ({"adapters": "lora"}, "adapters: expected one of onnx, found 'lora'"),
        ({"adapters": "onnx", "mode": "bake"}, "adapters: mode: expected one of feed, found 'bake'"),
        ({"adapters": "onnx", "target": "cpu"}, "adapters: expected target portable or web, found 'cpu'"),
    ],
)
def test_what_does_not_go_with_adapters_is_refused(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        build(BuildRequest("gpt2", {}, tmp_path / "out", **options))
