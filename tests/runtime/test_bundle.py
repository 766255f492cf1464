"""The bundle folder: what is refused when it is opened, and that no change leaves it half changed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import onnx
import pytest

from prefix_runtime import (
    Bundle,
    BundleError,
    BundleIntegrityError,
    DuplicateTaskError,
    LayerPrefix,
    Prefix,
    PrefixError,
    PrefixMismatchError,
    TaskNameError,
    UnknownTaskError,
    engine,
    load,
)
from prefix_runtime.bundle.folder import MANIFEST_NAME
from prefix_runtime.bundle.staging import check_output, staged
from prefix_runtime.files import sha256_of_file

FILES = ["config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "prefixes/p3.safetensors"]

# Forks for each step on the disk a child that is killed right before it, and tells what is left.
KILLED_BEFORE_EACH_STEP = """
import json, os, shutil, signal, sys
from pathlib import Path
from prefix_runtime import Bundle, Prefix

original, prefix, change = Path(sys.argv[1]), Prefix.load(sys.argv[2]), sys.argv[3]

def kill_before(last):
    steps = []
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and "/killed" in str(arguments[0]):
            steps.append(event)
            if len(steps) == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for step in range(1, 100):
    folder = Path(shutil.copytree(original, original.parent / f"killed-{step}"))
    bundle = Bundle.open(folder)
    if not (child := os.fork()):
        kill_before(step)
        bundle.add_task("new", prefix) if change == "add" else bundle.remove_task("p3")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    left = Bundle.open(folder)
    left.verify()
    found = {task: left.prefix(task).prefix_length for task in left.tasks}
    if "new" not in left.tasks:
        left.add_task("new", prefix)
        Bundle.open(folder).verify()
    print(json.dumps([os.waitstatus_to_exitcode(status), found]))
    if not status:
        break
"""

ADD_AND_REMOVE_WITHOUT_END = """
import sys
from prefix_runtime import Bundle, Prefix

bundle, prefix = Bundle.open(sys.argv[1]), Prefix.load(sys.argv[2])
print("ready", flush=True)
while True:
    bundle.add_task("new", prefix)
    bundle.remove_task("new")
"""

ADD_SOME = """
import sys
from prefix_runtime import Bundle, Prefix

bundle, prefix = Bundle.open(sys.argv[1]), Prefix.load(sys.argv[2])
sys.stdin.readline()
for name in sys.argv[3:]:
    bundle.add_task(name, prefix)
"""

ON_A_FULL_DISK = """
import resource, sys
from prefix_runtime import Bundle, Prefix

bundle, prefix = Bundle.open(sys.argv[1]), Prefix.load(sys.argv[2])
before = bundle.manifest
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    bundle.add_task("new", prefix) if sys.argv[4] == "add" else bundle.remove_task("p3")
except OSError as error:
    print(error.errno, bundle.manifest == before)
"""


def content(folder):
    """Every file's bytes, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_manifest(bundle, **fields):
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest | fields))


@pytest.fixture
def new_file(bundle, make_prefix):
    """A prefix file beside the bundle."""
    make_prefix(2).save(bundle.parent / "new.safetensors")
    return bundle.parent / "new.safetensors"


class TestOpening:
    def test_tells_what_it_holds(self, shared_bundle):
        bundle = Bundle.open(str(shared_bundle))
        assert bundle.tasks == ("p20", "p3")
        assert bundle.graph_path == shared_bundle / "model.onnx"
        named = {entry.path for entry in bundle.entries()}
        assert named == content(shared_bundle).keys() - {MANIFEST_NAME}

    def test_hashes_are_those_of_the_files(self, shared_bundle):
        bundle = Bundle.open(shared_bundle)
        bundle.verify()
        for entry in bundle.entries():
            assert entry.sha256 == sha256_of_file(shared_bundle / entry.path)

    def test_a_bundle_may_be_moved(self, bundle):
        moved = bundle.rename(bundle.parent / "moved here")
        Bundle.open(moved).verify()

    @pytest.mark.parametrize(
        "make",
        [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("text")],
        ids=["missing", "empty folder", "file"],
    )
    def test_what_is_no_bundle_is_refused(self, tmp_path, make):
        path = tmp_path / "nothing"
        make(path)
        with pytest.raises(BundleError, match=f"^{path}: expected a bundle .*{MANIFEST_NAME}.*found none.*build"):
            Bundle.open(path)

    @pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "a" * 300])
    def test_a_path_that_cannot_be_one_is_refused(self, tmp_path, name):
        with pytest.raises(BundleError):
            Bundle.open(tmp_path / name)

    def test_a_manifest_that_is_a_folder_is_refused(self, tmp_path):
        (tmp_path / MANIFEST_NAME).mkdir()
        with pytest.raises(BundleError, match=f"^{tmp_path / MANIFEST_NAME}: cannot be read: .*directory"):
            Bundle.open(tmp_path)

    def test_a_manifest_that_may_not_be_read_is_refused(self, bundle, as_nobody):
        (bundle / MANIFEST_NAME).chmod(0)
        with as_nobody(), pytest.raises(BundleError, match=f"{MANIFEST_NAME}: cannot be read: .*Permission denied"):
            Bundle.open(bundle)

    def test_a_manifest_that_is_not_utf8_is_refused(self, bundle):
        (bundle / MANIFEST_NAME).write_bytes(b"\xff\xfe{}")
        with pytest.raises(BundleError, match=f"^{bundle / MANIFEST_NAME}: cannot be read: 'utf-8'"):
            Bundle.open(bundle)

    def test_a_manifest_of_absurd_size_is_refused(self, bundle):
        os.truncate(bundle / MANIFEST_NAME, 1 << 40)
        with pytest.raises(BundleError, match=f"^{bundle / MANIFEST_NAME}: expected a manifest of at most"):
            Bundle.open(bundle)

    def test_a_truncated_manifest_is_refused_at_any_length(self, bundle):
        text = (bundle / MANIFEST_NAME).read_bytes().strip()
        for length in range(0, len(text), 97):
            (bundle / MANIFEST_NAME).write_bytes(text[:length])
            with pytest.raises(BundleError, match=f"^{bundle / MANIFEST_NAME}: expected JSON"):
                Bundle.open(bundle)

    def test_a_newer_format_version_is_refused(self, bundle):
        edit_manifest(bundle, format_version=3)
        with pytest.raises(BundleError, match=rf"^{bundle}/manifest\.json: expected format version 2.*found 3; update"):
            Bundle.open(bundle)

    @pytest.mark.parametrize("name", FILES)
    def test_a_missing_file_is_named(self, bundle, name):
        size = (bundle / name).stat().st_size
        (bundle / name).unlink()
        with pytest.raises(
            BundleIntegrityError, match=f"^{bundle / name}: expected a file of {size} bytes, found none"
        ):
            Bundle.open(bundle)

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("more", [-1, 1])
    def test_a_file_of_another_size_is_named(self, bundle, name, more):
        size = (bundle / name).stat().st_size
        os.truncate(bundle / name, size + more)
        with pytest.raises(
            BundleIntegrityError, match=f"^{bundle / name}: expected {size} bytes, found {size + more};"
        ):
            Bundle.open(bundle)

    @pytest.mark.parametrize("name", FILES)
    def test_a_file_of_another_content_is_named_by_verify(self, bundle, name):
        damaged = bytearray((bundle / name).read_bytes())
        damaged[len(damaged) // 2] ^= 1
        expected = sha256_of_file(bundle / name)
        (bundle / name).write_bytes(damaged)
        found = sha256_of_file(bundle / name)
        opened = Bundle.open(bundle)
        with pytest.raises(BundleIntegrityError, match=f"{bundle / name}: expected SHA-256 {expected}, found {found}"):
            opened.verify()

    def test_a_folder_in_place_of_a_file_is_refused(self, bundle):
        (bundle / "config.json").unlink()
        (bundle / "config.json").mkdir()
        with pytest.raises(BundleIntegrityError, match=r"config\.json: expected a file of .* found none"):
            Bundle.open(bundle)

    @pytest.mark.parametrize("name", ["model.onnx.data", "prefixes/p3.safetensors", "prefixes"])
    def test_a_link_that_leads_outside_is_refused(self, bundle, name):
        outside = (bundle / name).rename(bundle.parent / "outside")
        (bundle / name).symlink_to(outside)
        with pytest.raises(BundleError, match=f"expected a file inside the bundle, found a link to {outside}"):
            Bundle.open(bundle)

    def test_a_link_that_stays_inside_is_taken(self, bundle):
        (bundle / "model.onnx.data").rename(bundle / "weights")
        (bundle / "model.onnx.data").symlink_to("weights")
        Bundle.open(bundle).verify()

    def test_a_bundle_behind_a_link_is_taken(self, bundle):
        (bundle.parent / "link").symlink_to(bundle)
        Bundle.open(bundle.parent / "link").verify()

    def test_a_loop_of_links_is_refused(self, bundle):
        (bundle / "config.json").unlink()
        (bundle / "config.json").symlink_to("config.json")
        with pytest.raises(BundleIntegrityError, match=r"config\.json: expected a file"):
            Bundle.open(bundle)

    @pytest.mark.parametrize("path", ["a" * 300, "a\ud800", "a\nb"])
    def test_a_listed_name_that_cannot_be_a_files_is_refused(self, bundle, path):
        files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
        edit_manifest(bundle, files=[*files, {**files[0], "path": path}])
        with pytest.raises(BundleIntegrityError, match="expected a file of"):
            Bundle.open(bundle)


class TestSpecialFiles:
    """A pipe is not waited for, and a device is not read."""

    def test_a_manifest_that_is_a_pipe_is_refused(self, bundle, no_hang):
        (bundle / MANIFEST_NAME).unlink()
        os.mkfifo(bundle / MANIFEST_NAME)
        with no_hang, pytest.raises(BundleError, match=f"^{bundle / MANIFEST_NAME}: cannot be read: .*not a regular"):
            Bundle.open(bundle)

    def test_a_manifest_that_is_a_device_is_refused(self, bundle, no_hang):
        (bundle / MANIFEST_NAME).unlink()
        (bundle / MANIFEST_NAME).symlink_to("/dev/zero")
        with no_hang, pytest.raises(BundleError, match=f"^{bundle / MANIFEST_NAME}: cannot be read: .*not a regular"):
            Bundle.open(bundle)

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("when", ["opened", "verified"])
    def test_a_file_that_is_a_pipe_is_refused(self, bundle, no_hang, name, when):
        opened = Bundle.open(bundle)
        (bundle / name).unlink()
        os.mkfifo(bundle / name)
        with no_hang, pytest.raises(BundleIntegrityError, match=f"^{bundle / name}: expected a file of .* found none"):
            opened.verify() if when == "verified" else Bundle.open(bundle)

    def test_a_prefix_that_became_a_pipe_is_refused(self, bundle, no_hang):
        opened, path = Bundle.open(bundle), bundle / "prefixes/p3.safetensors"
        path.unlink()
        os.mkfifo(path)
        with no_hang, pytest.raises(PrefixError, match=f"^{path}: .*found not a regular file$"):
            opened.prefix("p3")


class TestVerifying:
    """Every byte that is used is the one that the manifest names, when it is used."""

    def damage(self, path):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    def test_a_prefix_that_is_changed_after_the_opening_is_refused_when_it_is_read(self, bundle):
        engine = load(bundle, threads=1, verify=True)
        self.damage(bundle / "prefixes/p3.safetensors")
        with pytest.raises(BundleIntegrityError, match=r"p3\.safetensors: expected SHA-256"):
            engine.generate(token_ids=[5], task="p3")
        assert engine.generate(token_ids=[5], task="p20", max_new_tokens=1).token_ids

    def test_without_verifying_it_is_read(self, bundle):
        engine = load(bundle, threads=1)
        self.damage(bundle / "prefixes/p3.safetensors")
        assert engine.generate(token_ids=[5], task="p3", max_new_tokens=1).token_ids

    @pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "generation_config.json"])
    @pytest.mark.parametrize("how", ["replaced", "written to", "removed"])
    def test_a_file_that_is_changed_while_it_is_opened_is_refused(self, bundle, monkeypatch, name, how):
        path, open_backend = bundle / name, engine.open_backend

        def change(*arguments, **options):
            if how == "replaced":
                shutil.copy2(path, path.with_name("copy")).replace(path)
            elif how == "written to":
                before = path.stat()
                path.write_bytes(path.read_bytes())
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            backend = open_backend(*arguments, **options)
            if how == "removed":
                path.rename(path.with_name("moved"))
            return backend

        monkeypatch.setattr(engine, "open_backend", change)
        monkeypatch.setattr(engine, "Engine", lambda *_, **__: None)  # which might miss the file itself
        with pytest.raises(BundleIntegrityError, match=f"^{path}: expected "):
            load(bundle, threads=1, verify=True)

    def test_weights_that_the_manifest_does_not_list_are_refused(self, bundle):
        files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
        edit_manifest(bundle, files=[entry for entry in files if entry["path"] != "model.onnx.data"])
        opened = Bundle.open(bundle)
        for verify in (opened.verify, opened.verify_graph):
            with pytest.raises(
                BundleIntegrityError, match=f"^{bundle}/model.onnx: expected weights .* found 'model.onnx.data', which"
            ):
                verify()

    def test_weights_of_any_name_are_compared_before_they_are_kept(self, bundle, rewrite):
        graph = onnx.load(bundle / "model.onnx", load_external_data=False)
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "weights.bin"
        (bundle / "model.onnx.data").rename(bundle / "weights.bin")
        text = (bundle / MANIFEST_NAME).read_text().replace('"model.onnx.data"', '"weights.bin"')
        (bundle / MANIFEST_NAME).write_text(text)
        rewrite(bundle, "model.onnx", graph.SerializeToString())
        Bundle.open(bundle).verify_graph()
        self.damage(bundle / "weights.bin")
        with pytest.raises(BundleIntegrityError, match=r"weights\.bin: expected SHA-256"):
            Bundle.open(bundle).verify_graph()

    def test_a_graph_that_is_none_is_refused(self, bundle, rewrite):
        rewrite(bundle, "model.onnx", b"\xff" * 50)
        with pytest.raises(BundleIntegrityError, match=f"^{bundle}/model.onnx: expected an ONNX graph, found"):
            Bundle.open(bundle).verify()


class TestPrefixes:
    def test_a_tasks_prefix_is_that_of_its_file(self, shared_bundle):
        prefix = Bundle.open(shared_bundle).prefix("p20")
        assert prefix == Prefix.load(shared_bundle / "prefixes/p20.safetensors")
        assert prefix.prefix_length == 20

    def test_an_unknown_task_is_refused_and_the_known_are_listed(self, shared_bundle):
        with pytest.raises(UnknownTaskError, match="task 'p4': there is none of this name; tasks here: p20, p3"):
            Bundle.open(shared_bundle).prefix("p4")

    def test_a_file_with_another_length_than_the_manifest_says_is_refused(self, bundle, make_prefix, rewrite):
        make_prefix(5).save(bundle.parent / "other")
        rewrite(bundle, "prefixes/p3.safetensors", (bundle.parent / "other").read_bytes())
        with pytest.raises(PrefixError, match=r"p3\.safetensors: expected prefix length 3 .* 3 .*found 5 and 5"):
            Bundle.open(bundle).prefix("p3")

    def test_a_file_with_another_position_base_than_the_manifest_says_is_refused(self, bundle, make_prefix, rewrite):
        make_prefix(3, position_base=0).save(bundle.parent / "other")
        rewrite(bundle, "prefixes/p3.safetensors", (bundle.parent / "other").read_bytes())
        with pytest.raises(PrefixError, match=r"position base 3 as the manifest says, found 3 and 0"):
            Bundle.open(bundle).prefix("p3")

    def test_a_damaged_file_is_refused(self, bundle, rewrite):
        rewrite(bundle, "prefixes/p3.safetensors", b"damaged")
        with pytest.raises(PrefixError, match=f"^{bundle}/prefixes/p3.safetensors: expected a whole safetensors file"):
            Bundle.open(bundle).prefix("p3")

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ({"layers": 2}, "expected 3 layers, found 2"),
            ({"layers": 4}, "expected 3 layers, found 4"),
            ({"heads": 2}, "layer 0, key: expected 4 key/value heads, found 2"),
            ({"head_dim": 8}, "layer 0, key: expected head size 16, found 8"),
            ({"base_fingerprint": "sha256:another"}, "another base model: expected fingerprint sha256:.*another"),
            ({"length": 319}, "leaves 2 of 320 positions for text, found one of length 319"),
            ({"length": 319, "position_base": 0}, "leaves 2 of 320 positions for text, found one of length 319"),
        ],
    )
    def test_a_prefix_for_another_model_is_refused_and_nothing_is_written(self, bundle, make_prefix, shape, message):
        before = content(bundle)
        with pytest.raises(PrefixMismatchError, match=f"^task 'new': .*{message}"):
            Bundle.open(bundle).add_task("new", make_prefix(**shape))
        assert content(bundle) == before

    def test_a_prefix_must_leave_room_in_the_length_that_the_manifest_says(self, bundle, make_prefix):
        edit_manifest(bundle, max_length=50)
        opened = Bundle.open(bundle)
        opened.add_task("new", make_prefix(48))
        with pytest.raises(PrefixMismatchError, match="leaves 2 of 50 positions for text, found one of length 49"):
            opened.add_task("longer", make_prefix(49))

    def test_a_value_of_another_shape_than_its_key_is_refused(self, shared_bundle, make_prefix):
        fitting, narrow = make_prefix().sites["decoder"], make_prefix(heads=3).sites["decoder"]
        layers = (*fitting[:2], LayerPrefix(fitting[2].key, narrow[2].value))
        with pytest.raises(PrefixMismatchError, match="layer 2, value: expected 4 key/value heads, found 3"):
            Bundle.open(shared_bundle).check_prefix(Prefix({"decoder": layers}, position_base=0), "here")

    @pytest.mark.parametrize("sites", [("encoder",), ("decoder", "cross")])
    def test_a_prefix_for_other_sites_is_refused(self, shared_bundle, make_prefix, sites):
        layers = make_prefix().sites["decoder"]
        prefix = Prefix(dict.fromkeys(sites, layers), position_base=0)
        message = f"^here: expected a prefix for the decoder alone.*found one for {', '.join(sorted(sites))}"
        with pytest.raises(PrefixMismatchError, match=message):
            Bundle.open(shared_bundle).check_prefix(prefix, "here")


class TestAddingAndRemoving:
    def test_an_added_task_is_on_the_disk(self, bundle, make_prefix):
        before, prefix = content(bundle), make_prefix(7, position_base=0)
        opened = Bundle.open(bundle)
        opened.add_task("new", prefix)
        assert opened.tasks == ("new", "p20", "p3")
        again = Bundle.open(bundle)
        again.verify()
        assert again.manifest == opened.manifest
        assert again.prefix("new") == prefix
        after = content(bundle)
        assert after.keys() - before.keys() == {"prefixes/new.safetensors"}
        assert {name for name in before if after[name] != before[name]} == {MANIFEST_NAME}

    def test_a_removed_task_is_gone_from_the_disk(self, bundle):
        before = content(bundle)
        opened = Bundle.open(bundle)
        opened.remove_task("p3")
        assert opened.tasks == ("p20",)
        again = Bundle.open(bundle)
        again.verify()
        assert again.tasks == ("p20",)
        assert again.manifest.parity["tasks"].keys() == {"p20"}
        after = content(bundle)
        assert before.keys() - after.keys() == {"prefixes/p3.safetensors"}
        assert {name for name in after if after[name] != before[name]} == {MANIFEST_NAME}

    def test_a_name_is_free_again_when_its_task_is_removed(self, bundle, make_prefix):
        opened = Bundle.open(bundle)
        opened.remove_task("p3")
        opened.add_task("p3", make_prefix(9))
        assert Bundle.open(bundle).prefix("p3").prefix_length == 9

    @pytest.mark.parametrize("name", ["p3", "P3", "p20"])
    def test_a_name_that_is_taken_is_refused_and_nothing_is_written(self, bundle, make_prefix, name):
        before = content(bundle)
        with pytest.raises(DuplicateTaskError, match=f"task '{name}': there is already '{name.lower()}'"):
            Bundle.open(bundle).add_task(name, make_prefix())
        assert content(bundle) == before

    @pytest.mark.parametrize("name", ["", "..", "../new", "/tmp/new", "a/b", "a\\b", ".new", None])
    def test_a_name_that_cannot_be_one_is_refused_and_nothing_is_written(self, bundle, make_prefix, name):
        before = content(bundle.parent)
        with pytest.raises(TaskNameError, match="expected 1 to 64 letters"):
            Bundle.open(bundle).add_task(name, make_prefix())
        assert content(bundle.parent) == before

    def test_an_unknown_task_is_not_removed_and_nothing_is_written(self, bundle):
        before = content(bundle)
        with pytest.raises(UnknownTaskError, match="tasks here: p20, p3"):
            Bundle.open(bundle).remove_task("p4")
        assert content(bundle) == before

    def test_a_change_that_another_process_made_is_kept(self, bundle, make_prefix):
        one, other = Bundle.open(bundle), Bundle.open(bundle)
        one.add_task("one", make_prefix())
        other.add_task("other", make_prefix())
        one.remove_task("p3")
        assert Bundle.open(bundle).tasks == ("one", "other", "p20")

    def test_the_same_name_added_by_another_process_is_refused(self, bundle, make_prefix):
        one, other = Bundle.open(bundle), Bundle.open(bundle)
        one.add_task("new", make_prefix())
        with pytest.raises(DuplicateTaskError):
            other.add_task("new", make_prefix(5))
        assert Bundle.open(bundle).prefix("new") == make_prefix()

    @pytest.mark.parametrize("change", ["add", "remove"])
    def test_the_manifest_never_names_a_file_that_is_not_there(self, bundle, make_prefix, monkeypatch, change):
        opened, seen = Bundle.open(bundle), []
        monkeypatch.setattr("os.fsync", lambda _: seen.append(set(Bundle.open(bundle).tasks)))
        opened.add_task("new", make_prefix()) if change == "add" else opened.remove_task("p3")
        before, after = {"p3", "p20"}, {"p3", "p20", "new"} if change == "add" else {"p20"}
        assert seen[0] == before
        assert seen[-1] == after

    @pytest.mark.parametrize("error", [OSError(errno.EIO, "broken disk"), KeyboardInterrupt()])
    @pytest.mark.parametrize("sync", [1, 2, 3, 4])
    def test_an_interrupted_add_leaves_the_old_state_or_the_new(self, bundle, make_prefix, monkeypatch, error, sync):
        before, opened, syncs = content(bundle), Bundle.open(bundle), []

        def fail(descriptor):
            syncs.append(descriptor)
            if len(syncs) == sync:
                raise error

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fail)
            with pytest.raises(type(error)):
                opened.add_task("new", make_prefix())
        Bundle.open(bundle).verify()
        # The last sync comes after the manifest was replaced: what it names must stay.
        if sync == 4:
            assert Bundle.open(bundle).prefix("new") == make_prefix()
        else:
            assert content(bundle) == before

    @pytest.mark.parametrize("error", [OSError(errno.EIO, "broken disk"), KeyboardInterrupt()])
    @pytest.mark.parametrize(("sync", "tasks"), [(1, ("p20", "p3")), (2, ("p20",))])
    def test_an_interrupted_removal_leaves_the_old_state_or_the_new(self, bundle, monkeypatch, error, sync, tasks):
        opened, syncs = Bundle.open(bundle), []

        def fail(descriptor):
            syncs.append(descriptor)
            if len(syncs) == sync:
                raise error

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(type(error)):
            opened.remove_task("p3")
        left = Bundle.open(bundle)
        left.verify()
        assert left.tasks == tasks


class TestDisasters:
    @pytest.mark.parametrize(("change", "after"), [("add", {"p3": 3, "p20": 20, "new": 2}), ("remove", {"p20": 20})])
    def test_a_kill_before_any_step_leaves_the_old_state_or_the_new(self, bundle, new_file, python, change, after):
        run = python(KILLED_BEFORE_EACH_STEP, bundle, new_file, change)
        assert run.stderr == ""
        *killed, last = [json.loads(line) for line in run.stdout.splitlines()]
        assert len(killed) > 5
        assert {code for code, _ in killed} == {-signal.SIGKILL}
        states = [state for _, state in killed]
        # All before the manifest is replaced have the old state, all behind it the new.
        turn = states.index(after)
        assert 0 < turn < len(states)
        assert states == [{"p3": 3, "p20": 20}] * turn + [after] * (len(states) - turn)
        assert last == [0, after]

    def test_kills_at_random_moments_leave_a_bundle_that_verifies(self, bundle, new_file):
        moments, lengths = random.Random(0), {"p3": 3, "p20": 20, "new": 2}
        for _ in range(5):
            command = [sys.executable, "-c", ADD_AND_REMOVE_WITHOUT_END, bundle, new_file]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout.readline() == "ready\n"
                time.sleep(moments.uniform(0, 0.1))
                process.kill()
            assert process.returncode == -signal.SIGKILL
            left = Bundle.open(bundle)
            left.verify()
            assert left.tasks in (("p20", "p3"), ("new", "p20", "p3"))
            assert all(left.prefix(task).prefix_length == lengths[task] for task in left.tasks)
            if "new" in left.tasks:
                left.remove_task("new")

    def test_tasks_added_by_several_processes_at_once_are_all_kept(self, bundle, new_file):
        names = [[f"task-{process}-{index}" for index in range(5)] for process in range(4)]
        processes = [
            subprocess.Popen([sys.executable, "-c", ADD_SOME, bundle, new_file, *some], stdin=subprocess.PIPE)
            for some in names
        ]
        for process in processes:
            process.stdin.write(b"go\n")
            process.stdin.close()
        assert [process.wait(60) for process in processes] == [0] * 4
        left = Bundle.open(bundle)
        left.verify()
        assert set(left.tasks) == {"p3", "p20"}.union(*names)

    @pytest.mark.parametrize(
        ("change", "limit"),
        [("add", 1_000), ("add", 50_000), ("remove", 50_000)],
        ids=["the prefix does not fit", "the manifest does not fit", "a shorter manifest does not fit"],
    )
    def test_a_full_disk_leaves_the_old_state_and_nothing_else(self, bundle, new_file, python, change, limit):
        edit_manifest(bundle, producer="x" * 100_000)
        assert 1_000 < new_file.stat().st_size < 50_000
        before = content(bundle)
        run = python(ON_A_FULL_DISK, bundle, new_file, limit, change)
        assert (run.stdout.split(), run.stderr) == ([str(errno.EFBIG), "True"], "")
        assert content(bundle) == before
        Bundle.open(bundle).verify()

    def test_a_folder_that_cannot_be_written_is_told_and_left(self, bundle, make_prefix, monkeypatch):
        def refuse(path, *_):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        before, opened = content(bundle), Bundle.open(bundle)
        monkeypatch.setattr("pathlib.Path.replace", refuse)
        with pytest.raises(PermissionError):
            opened.add_task("new", make_prefix())
        assert content(bundle) == before

    def test_what_a_kill_left_behind_does_not_get_in_the_way(self, bundle, make_prefix):
        (bundle / "prefixes/new.safetensors").write_bytes(b"left behind")
        (bundle / ".manifest.json.00000000.partial").write_bytes(b"left behind")
        Bundle.open(bundle).add_task("new", make_prefix())
        assert Bundle.open(bundle).prefix("new") == make_prefix()


class TestStaging:
    def test_the_folder_is_there_when_the_block_ends_well(self, tmp_path):
        output = tmp_path / "bundle"
        with staged(output) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text("content")
            assert not output.exists()
            assert folder.parent == output.parent
        assert content(tmp_path) == {"bundle/deep/file": b"content"}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
    def test_an_error_leaves_nothing_behind(self, tmp_path, error):
        def fail():
            with staged(tmp_path / "bundle") as folder:
                (folder / "file").write_text("content")
                raise error

        with pytest.raises(error):
            fail()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "make",
        [lambda path: path.mkdir(), lambda path: path.write_text("mine"), lambda path: path.symlink_to("nowhere")],
        ids=["folder", "file", "dangling link"],
    )
    def test_what_exists_is_never_written_over(self, tmp_path, make):
        output = tmp_path / "bundle"
        make(output)
        with pytest.raises(BundleError, match=f"^{output}: expected nothing there yet"), staged(output):
            pytest.fail("the block must not be entered")
        assert list(tmp_path.iterdir()) == [output]

    def test_what_appeared_meanwhile_is_never_written_over(self, tmp_path):
        output = tmp_path / "bundle"

        def make_another():
            with staged(output):
                output.mkdir()
                (output / "file").write_text("another's")

        with pytest.raises(BundleError, match="expected nothing there yet"):
            make_another()
        assert content(tmp_path) == {"bundle/file": b"another's"}
        assert list(tmp_path.iterdir()) == [output]

    def test_the_folder_that_it_is_to_stand_in_must_be_there(self, tmp_path):
        with pytest.raises(BundleError, match=f"^{tmp_path / 'no'}: expected a folder to write into"):
            check_output(tmp_path / "no" / "bundle")

    def test_a_relative_output_stands_in_the_working_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with staged(type(tmp_path)("bundle")) as folder:
            (folder / "file").write_text("content")
        assert content(tmp_path) == {"bundle/file": b"content"}


def test_a_prefix_of_an_unknown_base_is_taken(bundle, make_prefix):
    # Other trainers' checkpoints do not tell their base: the geometry is all there is to compare.
    assert make_prefix().base_fingerprint is None
    Bundle.open(bundle).add_task("new", replace(make_prefix(), base_fingerprint=None))
    assert "new" in Bundle.open(bundle).tasks
