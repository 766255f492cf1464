"""The recipe: what a bundle holds, what is refused before any work, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import transformers
from tokenizers import Tokenizer

import prefix_export
from prefix_export.build import folding, writing
from prefix_export.build import plan as export
from prefix_export.build import recipe as build_module
from prefix_export.build.recipe import BuildRequest, build, verify_against
from prefix_export.errors import CheckpointError, ExportError, ModelError, ParityError, UnsupportedArchitectureError
from prefix_export.models import load_base_model
from prefix_export.verify import all_tasks as verification
from prefix_export.verify.all_tasks import certificate
from prefix_export.verify.parity import TaskParity
from prefix_runtime import BundleError, DuplicateTaskError, PrefixMismatchError, TaskNameError
from prefix_runtime.bundle import staging
from tests.export.conftest import RecordedProgress, Trap, read_prefix

GRAPH = ("model.onnx", "model.onnx.data")


@pytest.fixture(scope="module")
def model(workshop):
    return workshop.model("gpt2", tokenizer=True)


@pytest.fixture(scope="module")
def built(workshop, model, tmp_path_factory):
    """A real, verified build of three prefixes: an adapter's folder, an adapter's file, a prefix file."""
    root = tmp_path_factory.mktemp("built")
    folder = Path(shutil.copytree(workshop.adapter(model, 3), root / "adapter"))
    trap = Trap(root / "sprung")
    trap.set(folder / "adapter_model.bin")
    file = Path(shutil.copytree(workshop.adapter(model, 20), root / "other")) / "adapter_model.safetensors"
    read_prefix(folder, load_base_model(str(model)).shape).save(root / "own.safetensors")
    prefixes = {"folder": folder, "file": file, "own": root / "own.safetensors"}
    progress = RecordedProgress()
    result = build(BuildRequest(str(model), prefixes, root / "out"), progress)
    return SimpleNamespace(root=root / "out", prefixes=prefixes, progress=progress, result=result, trap=trap)


@pytest.fixture
def quick(monkeypatch, built):
    """Builds take the graph that was built before in place of an export."""

    def copy(_decoder, _positions, path, **_):
        for name in GRAPH:
            shutil.copy(built.root / name, path.parent)
        return 1

    monkeypatch.setattr(export, "export_graph", copy)


@pytest.fixture
def place(tmp_path):
    """An empty folder to build in."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_the_bundle_has_the_layout_of_the_design(built):
    assert {str(path.relative_to(built.root)) for path in built.root.rglob("*") if path.is_file()} == {
        "manifest.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *GRAPH,
        "prefixes/folder.safetensors",
        "prefixes/file.safetensors",
        "prefixes/own.safetensors",
    }
    assert [path.name for path in built.root.parent.iterdir() if path.name.startswith(".")] == []


def test_the_manifest_names_every_file_with_its_hash(built):
    manifest = manifest_of(built.root)
    listed = [*manifest["files"], *(task["file"] for task in manifest["tasks"].values())]
    found = {path for path in built.root.rglob("*") if path.is_file()} - {built.root / "manifest.json"}
    assert {built.root / entry["path"] for entry in listed} == found
    for entry in listed:
        content = (built.root / entry["path"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_the_manifest_says_what_the_model_is(built, model):
    manifest = manifest_of(built.root)
    base = load_base_model(str(model))
    assert manifest["producer"] == f"prefix-export {prefix_export.__version__}"
    assert manifest["model"] == {
        "name": model.name,
        "architecture": "GPT2LMHeadModel",
        "fingerprint": base.fingerprint,
        "revision": None,  # of a folder
    }
    assert manifest["geometry"] == {
        "sites": {"decoder": [{"key_value_heads": 4, "head_dim": 16}] * 3},
        "context_length": 320,
        "vocab_size": 384,
        "source_length": None,
    }
    said = [manifest[key] for key in ("max_length", "mode", "flavour", "precision", "target", "graph")]
    assert said == [320, "feed", "fast", "fp32", "cpu", "model.onnx"]


def test_prefixes_are_folded_and_marked_as_made_for_the_model(built, model):
    base = load_base_model(str(model))
    for task, path in built.prefixes.items():
        folded = read_prefix(path, base.shape)
        assert built.result.bundle.prefix(task) == replace(folded, base_fingerprint=base.fingerprint)


def test_configs_and_tokenizer_are_the_models_own(built, model):
    assert transformers.AutoConfig.from_pretrained(built.root).to_diff_dict() == (
        transformers.AutoConfig.from_pretrained(model).to_diff_dict()
    )
    assert transformers.GenerationConfig.from_pretrained(built.root).eos_token_id == 0
    text = "the quick brown fox, größer"
    ours, theirs = (Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text) for folder in (built.root, model))
    assert ours.ids == theirs.ids


def test_the_certificate_names_what_each_task_was_compared_with(built):
    parity = manifest_of(built.root)["parity"]
    framework = f"transformers {transformers.__version__}"
    assert parity["bare_model"]["reference"] == parity["tasks"]["own"]["reference"] == framework
    adapters = {parity["tasks"][task]["reference"] for task in ("folder", "file")}
    assert adapters == {f"peft {peft.__version__}"}
    assert parity == certificate(built.result.parity, {}, 0)


def test_a_pickle_beside_the_weights_is_never_unpickled(built):
    assert (built.prefixes["folder"] / "adapter_model.bin").exists()
    assert not built.trap.sprung


def test_nothing_of_the_machine_is_in_any_file_of_the_bundle(built, workshop):
    traces = [workshop.root, built.root.parent, Path(prefix_export.__file__).parents[1], Path.home(), "site-packages"]
    for path in built.root.rglob("*"):
        for trace in traces:
            assert path.is_dir() or str(trace).encode() not in path.read_bytes(), f"{trace} in {path}"


def test_phases_are_told_in_their_order(built):
    told = built.progress
    assert list(dict.fromkeys(told.phases)) == [
        "load",
        "fold",
        "run the source framework in double precision",
        "run the source framework",
        "export",
        "simplify the graph",
        "save the graph",
        "check the graph",
        "hash",
        "open the bundle",
        "compare",
        "write to the disk",
    ]
    assert list(built.result.phase_seconds) == list(dict.fromkeys(told.phases))
    assert 0 < sum(built.result.phase_seconds.values()) <= built.result.seconds


def test_phases_count_their_steps(built):
    told, layers, prompts = built.progress, 3, 5
    assert (told.totals["fold"], told.steps["fold"]) == (3, 3)
    assert (told.totals["export"], told.steps["export"] >= layers) == (layers, True)
    assert (told.totals["compare"], told.steps["compare"]) == (4 * prompts, 4 * prompts)
    assert told.steps["save the graph"] == pytest.approx((built.root / "model.onnx.data").stat().st_size / 1e6, rel=0.1)
    hashed = [path for path in built.root.rglob("*") if path.is_file() and path.parent.name != "prefixes"]
    megabytes = sum(path.stat().st_size for path in hashed if path.name != "manifest.json") / 1e6
    assert told.steps["hash"] == pytest.approx(megabytes)
    assert told.totals["hash"] == round(megabytes)


def test_a_sound_build_has_no_warnings(built):
    assert built.result.warnings == ()
    assert built.result.seconds > 0


def test_a_bundle_agrees_with_its_model_later_on(built, model):
    results = verify_against(built.result.bundle, str(model))
    assert set(results) == {None, "folder", "file", "own"}
    assert all(result.agrees and result.prompts == 5 for result in results.values())


def test_a_bundle_is_not_compared_with_another_model(built, workshop):
    with pytest.raises(ModelError, match=r"expected the bundle's base model 'gpt2-0-text', found other weights"):
        verify_against(built.result.bundle, str(workshop.model("gpt2", seed=1)))


@pytest.mark.usefixtures("quick")
def test_a_graph_that_does_not_agree_is_not_shipped(workshop, place):
    # The graph of one model, the weights of another.
    with pytest.raises(ParityError, match="the bare model"):
        build(BuildRequest(str(workshop.model("gpt2", seed=1)), {}, place / "out"))
    assert not list(place.iterdir())


@pytest.mark.usefixtures("quick")
def test_without_verification_there_is_no_certificate(model, built, place):
    result = build(BuildRequest(str(model), built.prefixes, place / "out", verify=False))
    assert result.parity == {}
    assert manifest_of(place / "out")["parity"] is None


@pytest.mark.usefixtures("quick")
def test_a_bundle_may_have_no_tasks(model, place):
    build(BuildRequest(str(model), {}, place / "out", verify=False))
    assert manifest_of(place / "out")["tasks"] == {}


@pytest.mark.usefixtures("quick")
def test_a_prefix_for_another_base_model_is_refused_by_fingerprint(model, built, place):
    ours = read_prefix(built.prefixes["own"], load_base_model(str(model)).shape)
    replace(ours, base_fingerprint=f"sha256:{'0' * 64}").save(place.parent / "alien.safetensors")
    with pytest.raises(PrefixMismatchError, match=r"alien\.safetensors: made for another base model: .*sha256:0000"):
        build(BuildRequest(str(model), {"alien": place.parent / "alien.safetensors"}, place / "out", verify=False))
    assert not list(place.iterdir())


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/model", "a/b/c", "my model", "modèle", "x" * 97, "x" * 5000 + "/y/z"]
)
def test_a_model_that_can_only_be_a_path_is_refused_before_any_work(place, name):
    with pytest.raises(ModelError, match=r"expected a Hub id or a folder with a config.json, found no such folder$"):
        build(BuildRequest(name, {}, place / "out"))


@pytest.mark.usefixtures("no_work")
def test_an_adapter_given_as_the_model_is_named(adapter, place):
    with pytest.raises(ModelError, match=r"found a folder without; it holds an adapter: name it with --prefix"):
        build(BuildRequest(str(adapter), {}, place / "out"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["nowhere", "/nowhere", "../a/b", "x" * 5000])
def test_a_checkpoint_that_can_only_be_a_path_is_refused_before_any_work(place, name):
    with pytest.raises(CheckpointError, match=r"expected a trained prefix, a file or a folder, found nothing there$"):
        build(BuildRequest("gpt2", {"task": Path(name)}, place / "out"))


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(build_module, "load_base_model", lambda _: pytest.fail("the model was loaded first"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_output_that_exists_is_refused_before_any_work_and_stays(place, kind):
    output = place / "out"
    if kind == "folder":
        output.mkdir()
        (output / "precious").write_text("mine")
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to(place / "nowhere")
    with pytest.raises(BundleError, match=r"out: expected nothing there yet; remove it or choose"):
        build(BuildRequest("gpt2", {}, output))
    assert [path.name for path in place.iterdir()] == ["out"]
    assert output.is_symlink() or (output / "precious" if kind == "folder" else output).read_text() == "mine"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("parent", ["missing", "file"])
def test_an_output_without_a_folder_to_stand_in_is_refused_before_any_work(place, parent):
    if parent == "file":
        (place / parent).touch()
    with pytest.raises(BundleError, match=rf"{parent}: expected a folder to write into, found none"):
        build(BuildRequest("gpt2", {}, place / parent / "out"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "/etc", "a\\b", "a b", "a..b", ".hidden", "end.", "größe", "x" * 65, "new\nline", "C:x"]
)
def test_a_name_that_cannot_name_a_task_is_refused_before_any_work(place, name):
    with pytest.raises(TaskNameError) as caught:
        build(BuildRequest("gpt2", {"good": place, name: place}, place / "out"))
    assert f"found {name!r}" in str(caught.value)
    assert not list(place.iterdir())


@pytest.mark.usefixtures("no_work")
def test_names_that_differ_in_case_alone_are_refused_before_any_work(place):
    with pytest.raises(DuplicateTaskError, match="task 'e2e': there is already 'E2E'"):
        build(BuildRequest("gpt2", {"E2E": place, "e2e": place}, place / "out"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("max_length", [-1, 0, 1])
def test_a_max_length_without_room_for_text_is_refused_before_any_work(place, max_length):
    with pytest.raises(ModelError, match=rf"max_length: expected 2 or more, found {max_length}$"):
        build(BuildRequest("gpt2", {}, place / "out", max_length=max_length))


def test_a_max_length_beyond_the_context_is_refused(model, place):
    with pytest.raises(ModelError, match=r"max_length: expected 2 to the context .*, 320, found 321$"):
        build(BuildRequest(str(model), {}, place / "out", max_length=321))
    assert not list(place.iterdir())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("max_length", [5, 320])
def test_a_max_length_within_the_context_is_kept(model, built, place, max_length):
    prefixes = {"task": built.prefixes["folder"]}
    result = build(BuildRequest(str(model), prefixes, place / "out", max_length, verify=False))
    assert result.bundle.manifest.max_length == max_length


@pytest.mark.parametrize(("task", "max_length"), [("folder", 4), ("file", 20), ("own", 2)])
def test_a_prefix_that_leaves_no_room_for_text_is_refused(model, built, place, task, max_length):
    length = {"folder": 3, "file": 20, "own": 3}[task]
    message = rf"expected a prefix that leaves 2 of {max_length} positions for text, found one of length {length}"
    with pytest.raises(PrefixMismatchError, match=message):
        build(BuildRequest(str(model), {task: built.prefixes[task]}, place / "out", max_length=max_length))
    assert not list(place.iterdir())


def test_a_prefix_as_long_as_the_context_is_refused(workshop, model, place):
    with pytest.raises(PrefixMismatchError, match="320"):
        build(BuildRequest(str(model), {"long": workshop.adapter(model, 320)}, place / "out"))
    assert not list(place.iterdir())


def test_a_head_size_that_the_operator_cannot_run_is_refused_before_the_export(place, monkeypatch):
    config = transformers.GPT2Config(n_embd=24, n_head=2, n_layer=1, n_positions=32, vocab_size=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(place / "model")
    monkeypatch.setattr(export, "export_graph", lambda *_: pytest.fail("the graph was exported first"))
    with pytest.raises(UnsupportedArchitectureError, match=r"multiple of 8.*found 12"):
        build(BuildRequest(str(place / "model"), {}, place / "out"))
    assert [path.name for path in place.iterdir()] == ["model"]


STAGES = [
    (build_module, "load_base_model"),
    (folding, "fold"),
    (export, "export_graph"),
    (writing, "save_configs"),
    (writing, "describe_file"),
    (writing, "write_prefix"),
    (writing, "_write_manifest"),
    (verification, "Session"),
    (verification, "observe"),
    (verification, "compare"),
    (writing, "certificate"),
    (staging, "sync_tree"),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "interrupt"]
)
@pytest.mark.parametrize(("module", "name"), STAGES, ids=[name for _, name in STAGES])
def test_a_failure_at_any_stage_leaves_nothing_behind(model, built, place, monkeypatch, module, name, error):
    def fail(*_args, **_kwargs):
        raise error

    if name not in ("observe", "compare"):  # those take seconds
        agreement = TaskParity("script", 0.0, 0.0, 1e-4, greedy_tokens_equal=True, ties=0, prompts=1, text_prompts=0)
        monkeypatch.setattr(verification, "observe", lambda *_, **__: SimpleNamespace(prompts=()))
        monkeypatch.setattr(verification, "measured", lambda expectation, *_, **__: expectation)
        monkeypatch.setattr(verification, "compare", lambda *_: agreement)
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(type(error)):
        build(BuildRequest(str(model), {"task": built.prefixes["folder"]}, place / "out"))
    assert not list(place.iterdir())


def test_a_failure_in_the_middle_of_the_export_leaves_nothing_behind(model, place, monkeypatch):
    def half(_decoder, _positions, path, **_):
        path.with_name("model.onnx.data").write_bytes(b"half of it")
        assert [path.suffix for path in place.iterdir()] == [".partial"]
        raise ExportError("graph: cannot be made")

    monkeypatch.setattr(export, "export_graph", half)
    with pytest.raises(ExportError):
        build(BuildRequest(str(model), {}, place / "out"))
    assert not list(place.iterdir())


def test_an_output_that_appears_during_the_build_is_not_overwritten(model, built, place, monkeypatch):
    def late(_decoder, _positions, path, **_):
        for name in GRAPH:
            shutil.copy(built.root / name, path.parent)
        (place / "out").mkdir()
        return 1

    monkeypatch.setattr(export, "export_graph", late)
    with pytest.raises(BundleError, match="expected nothing there yet"):
        build(BuildRequest(str(model), {}, place / "out", verify=False))
    assert [path.name for path in place.rglob("*")] == ["out"]


@pytest.mark.usefixtures("quick")
def test_an_adapter_that_names_another_base_model_gives_a_warning(workshop, adapter, edit, place):
    gpt2 = workshop.model("gpt2")
    edit(adapter, base_model_name_or_path="someone/other")
    result = build(BuildRequest(str(gpt2), {"task": adapter}, place / "out", verify=False))
    assert result.warnings == (
        f"{gpt2} has no tokenizer: the bundle takes token ids, not text",
        "task 'task': the prefix says that it was trained on 'someone/other', not on 'gpt2-0'",
    )


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("length", "tokens"), [(23, 1), (24, 0)])
def test_a_sliding_window_that_the_text_outgrows_gives_a_warning(workshop, place, length, tokens):
    model = workshop.model("mistral_windowed", tokenizer=True)
    result = build(BuildRequest(str(model), {"t": workshop.adapter(model, length)}, place / "out", verify=False))
    message = (
        "task 't': layers with a sliding window of 24 positions see the whole prefix during the first "
        f"{tokens} tokens of text only"
    )
    assert result.warnings == (message,)
