"""What the manifest says survives a round trip; what it must not say is refused by name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_runtime import BundleError, DuplicateTaskError, Manifest, TaskNameError, UnknownTaskError
from prefix_runtime.bundle.manifest import (
    FORMAT_VERSION,
    FileEntry,
    ModelEntry,
    TaskEntry,
    check_relative_path,
)
from prefix_runtime.bundle.task_names import check_new_task_name, check_task_name
from prefix_runtime.prefix.geometry import Geometry, LayerGeometry

SHA256 = "0123456789abcdef" * 4
MANIFEST = Manifest(
    producer="prefix-export 0.1.0",
    model=ModelEntry("gpt2", "GPT2LMHeadModel", "sha256:base"),
    geometry=Geometry({"decoder": (LayerGeometry(4, 16), LayerGeometry(2, 32))}, context_length=320, vocab_size=384),
    max_length=300,
    mode="feed",
    flavour="fast",
    precision="fp32",
    target="cpu",
    graph="model.onnx",
    weight_bytes=1000,
    files={path: FileEntry(path, 10, SHA256) for path in ("model.onnx", "onnx/model.onnx.data")},
    tasks={
        "xsum": TaskEntry(FileEntry("prefixes/xsum.safetensors", 20, SHA256), 5, 5),
        "e2e": TaskEntry(FileEntry("prefixes/e2e.safetensors", 30, SHA256), 7, 0),
    },
    parity={
        "bare_model": {"tolerance": 1e-4},
        "tasks": {task: {"reference": "peft", "largest_logit_difference": 1e-6} for task in ("e2e", "xsum")},
    },
)

TEXTS = ["format", "producer", "model.name", "model.architecture", "model.fingerprint", "mode", "flavour", "precision"]
TEXTS += ["target", "graph", "files.0.path", "files.1.sha256", "tasks.e2e.file.path", "tasks.e2e.file.sha256"]
NUMBERS = ["format_version", "geometry.sites.decoder.0.key_value_heads", "geometry.sites.decoder.1.head_dim"]
NUMBERS += ["max_length", "geometry.context_length", "geometry.vocab_size", "files.0.size", "tasks.xsum.prefix_length"]
NUMBERS += ["tasks.xsum.position_base", "tasks.xsum.file.size"]
OBJECTS = ["model", "geometry", "tasks", "tasks.e2e.file"]
LISTS = ["files", "geometry.sites.decoder"]
OUTSIDE = ["", "/etc/passwd", "../model.onnx", "a/../../b", "a/..", "..", ".", "a/./b", "a//b", "a/", "a\\b", "..\\b"]
OUTSIDE += ["C:/model.onnx", "C:model.onnx", "\\\\host\\share", "//host/share", "a\0b"]
NO_NAMES = [
    "",
    " ",
    ".",
    "..",
    "a..b",
    "../a",
    "/a",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:a",
    "a\0",
    "a\n",
    "a ",
    "a b",
    ".a",
]
NO_NAMES += [".a", "-a", "a.", "é", "任务", "٣", "x" * 65, "a*", "a=b", None, 3, 3.5, True, b"a", ["a"]]
MISSING = object()


def encoder_decoder():
    """The manifest of a model with an encoder, and a task with a prefix for two of its sites."""
    layers = (LayerGeometry(4, 16),)
    sites = {"decoder": layers * 3, "cross": layers * 3, "encoder": layers * 2}
    files = {path: FileEntry(path, 10, SHA256) for path in ("model.onnx", "encoder.onnx")}
    return replace(
        MANIFEST,
        geometry=Geometry(sites, context_length=320, vocab_size=384, source_length=512),
        files=files,
        encoder_graph="encoder.onnx",
        tasks={"e2e": replace(MANIFEST.tasks["e2e"], sites=("cross", "decoder"))},
    )


def changed(field, value, manifest=MANIFEST):
    """The manifest's text with another value in a field, `a.b.0.c`, or without it."""
    content = json.loads(manifest.to_json())
    *parents, last = [int(part) if part.isdigit() else part for part in field.split(".")]
    place = content
    for part in parents:
        place = place[part]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return json.dumps(content)


def message_for(field, value, error=BundleError, manifest=MANIFEST):
    with pytest.raises(error) as caught:
        Manifest.from_json(changed(field, value, manifest), "here")
    return str(caught.value)


class TestReading:
    @pytest.mark.parametrize("manifest", [MANIFEST, replace(MANIFEST, tasks={}), replace(MANIFEST, parity=None)])
    def test_what_is_read_is_what_was_written(self, manifest):
        assert Manifest.from_json(manifest.to_json(), "here") == manifest

    def test_a_manifest_of_the_first_format_version_is_read(self):
        content = json.loads(MANIFEST.to_json())
        content["format_version"] = 1
        content["geometry"] = {**content["geometry"], "layers": content["geometry"].pop("sites")["decoder"]}
        del content["encoder_graph"], content["geometry"]["source_length"]
        for task in content["tasks"].values():
            del task["sites"]
        assert Manifest.from_json(json.dumps(content), "here") == MANIFEST

    def test_an_encoder_decoder_has_three_sites_and_two_graphs(self):
        manifest = encoder_decoder()
        assert Manifest.from_json(manifest.to_json(), "here") == manifest
        assert manifest.geometry.is_encoder_decoder
        assert [entry.path for entry in manifest.graph_files] == ["model.onnx", "encoder.onnx"]

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("geometry.sites.cross", [], "geometry: sites: cross: expected at least one, found none"),
            ("geometry.sites.encoder", MISSING, "geometry: sites: encoder: expected list, found nothing"),
            ("geometry.source_length", None, "geometry: source_length: expected int, found NoneType 'None'"),
            ("encoder_graph", MISSING, "encoder_graph: expected str, found nothing"),
            ("encoder_graph", "other.onnx", "encoder_graph: expected one of the listed files, found 'other.onnx'"),
            ("tasks.e2e.sites", ["vision"], "tasks.e2e: sites: expected some of decoder, cross, encoder, found "),
        ],
    )
    def test_what_an_encoder_decoder_lacks_is_named(self, field, value, message):
        assert message_for(field, value, manifest=encoder_decoder()).startswith(f"here: {message}")

    def test_a_task_of_a_decoder_only_model_has_no_other_site(self):
        message = message_for("tasks.e2e.sites", ["cross"])
        assert message == "here: tasks.e2e: sites: expected some of decoder, found ['cross']"

    def test_the_same_content_has_the_same_text(self):
        turned = replace(
            MANIFEST,
            files=dict(reversed(MANIFEST.files.items())),
            tasks=dict(reversed(MANIFEST.tasks.items())),
        )
        assert turned.to_json() == MANIFEST.to_json()

    def test_fields_of_a_later_minor_version_are_ignored(self):
        assert Manifest.from_json(changed("comment", "new"), "here") == MANIFEST

    def test_a_task_names_no_file_but_its_own(self):
        # Removing the task would remove what it names.
        message = message_for("tasks.e2e.file.path", "model.onnx")
        assert message == ("here: tasks.e2e: file: path: expected 'prefixes/e2e.safetensors', found 'model.onnx'")

    def test_a_file_that_is_listed_twice_is_refused(self):
        assert "each path once" in message_for("files.1.path", MANIFEST.graph)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("geometry.vocab_size", 10**15),
            ("geometry.context_length", 2**40),
            ("geometry.sites.decoder.0.key_value_heads", 10**9),
            ("geometry.sites.decoder.1.head_dim", 10**9),
            ("block_size", -5),
            ("block_size", 10**9),
        ],
    )
    def test_numbers_that_no_model_has_are_refused(self, field, value):
        assert f"{field.rpartition('.')[2]}: expected a number of" in message_for(field, value)

    def test_an_unknown_quantizer_is_refused(self):
        assert "quantizer: expected 'rtn' or 'hqq', found 'zzz'" in message_for("quantizer", "zzz")

    def test_scales_of_eight_bits_are_among_the_files(self):
        # Else no hash would tell that they were changed.
        assert "files: expected cache_scales.safetensors among them" in message_for("cache", "int8")

    def test_tasks_that_differ_in_case_alone_are_refused(self):
        entry = json.loads(MANIFEST.to_json())["tasks"]["e2e"]
        entry["file"]["path"] = "prefixes/E2E.safetensors"
        assert "there is already" in message_for("tasks.E2E", entry, DuplicateTaskError)

    @pytest.mark.parametrize("value", ["small", 1])
    @pytest.mark.parametrize("name", ["error", "largest_logit_difference"])
    def test_a_certificate_whose_figure_is_none_is_refused(self, name, value):
        result = {"reference": "peft", name: value}
        assert f"parity: tasks.e2e: {name}: expected float" in message_for("parity.tasks.e2e", result)

    def test_a_certificate_without_a_figure_is_refused(self):
        assert "error: expected float, found nothing" in message_for("parity.tasks.e2e", {"reference": "peft"})

    @pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
    def test_a_newer_format_version_is_refused(self, version):
        message = message_for("format_version", version)
        assert message == f"here: expected format version 2 or older, found {version}; update prefix-runtime"

    def test_another_format_is_refused(self):
        assert message_for("format", "zip") == "here: expected format 'prefix-export.bundle', found 'zip'"

    @pytest.mark.parametrize("field", [*TEXTS, *NUMBERS, *OBJECTS, *LISTS])
    def test_a_missing_field_is_named(self, field):
        *_, last = field.split(".")
        message = message_for(field, MISSING)
        assert message.startswith("here: ")
        assert f"{last}: expected " in message
        assert message.endswith(", found nothing")

    @pytest.mark.parametrize("field", TEXTS)
    @pytest.mark.parametrize("value", [3, None, True, ["a"], {}])
    def test_what_is_no_text_is_refused(self, field, value):
        *_, last = field.split(".")
        assert f"{last}: expected str, found {type(value).__name__} " in message_for(field, value)

    @pytest.mark.parametrize("field", NUMBERS)
    @pytest.mark.parametrize("value", ["3", None, True, False, 3.0, [3]])
    def test_what_is_no_whole_number_is_refused(self, field, value):
        *_, last = field.split(".")
        assert f"{last}: expected int, found {type(value).__name__} " in message_for(field, value)

    @pytest.mark.parametrize("field", NUMBERS)
    @pytest.mark.parametrize("value", [-1, 2**63, 10**4000])
    def test_a_number_out_of_range_is_refused(self, field, value):
        *_, last = field.split(".")
        assert f"{last}: expected a number of " in message_for(field, value)

    @pytest.mark.parametrize(
        "field", [field for field in NUMBERS if not field.endswith(("size", "position_base"))] + ["geometry.vocab_size"]
    )
    def test_a_zero_where_there_must_be_some_is_refused(self, field):
        *_, last = field.split(".")
        assert f"{last}: expected a number of 1 or more, found 0" in message_for(field, 0)

    @pytest.mark.parametrize("field", OBJECTS)
    @pytest.mark.parametrize("value", [3, "a", None, []])
    def test_what_is_no_object_is_refused(self, field, value):
        *_, last = field.split(".")
        assert f"{last}: expected dict, found {type(value).__name__} " in message_for(field, value)

    @pytest.mark.parametrize("field", LISTS)
    @pytest.mark.parametrize("value", [3, "a", None, {}])
    def test_what_is_no_list_is_refused(self, field, value):
        *_, last = field.split(".")
        assert f"{last}: expected list, found {type(value).__name__} " in message_for(field, value)

    @pytest.mark.parametrize("field", ["files.1", "geometry.sites.decoder.1", "tasks.e2e"])
    @pytest.mark.parametrize("value", [3, "a", None, []])
    def test_an_item_that_is_no_object_is_refused_by_its_place(self, field, value):
        place = {"files.1": "files[1]", "geometry.sites.decoder.1": "decoder[1]", "tasks.e2e": "tasks.e2e"}[field]
        assert f"{place}: expected a JSON object, found {type(value).__name__}" in message_for(field, value)

    def test_a_model_without_layers_is_refused(self):
        message = message_for("geometry.sites.decoder", [])
        assert message == "here: geometry: sites: decoder: expected at least one, found none"

    @pytest.mark.parametrize("field", ["mode", "flavour", "precision", "target"])
    def test_a_kind_that_came_later_is_refused(self, field):
        message = message_for(field, "later")
        assert message.startswith(f"here: {field}: expected '")
        assert message.endswith("found 'later'; update prefix-runtime")

    @pytest.mark.parametrize("graph", ["other.onnx", "", "../model.onnx"])
    def test_a_graph_that_is_not_listed_is_refused(self, graph):
        assert message_for("graph", graph) == f"here: graph: expected one of the listed files, found {graph!r}"

    @pytest.mark.parametrize("field", ["files.0.sha256", "tasks.e2e.file.sha256"])
    @pytest.mark.parametrize("value", ["", "ab", SHA256.upper(), SHA256 + "0", SHA256[:-1] + "g", SHA256 + "\n"])
    def test_a_hash_that_is_none_is_refused(self, field, value):
        assert "sha256: expected 64 hexadecimal digits, found " in message_for(field, value)

    @pytest.mark.parametrize("field", ["files.0.path", "tasks.e2e.file.path"])
    @pytest.mark.parametrize(
        "path",
        OUTSIDE,
    )
    def test_a_path_that_may_lead_outside_is_refused(self, field, path):
        message = message_for(field, path)
        assert f"path: expected a relative path inside the bundle, found {path!r}" in message

    @pytest.mark.parametrize("name", ["", "..", "../x", "/x", "a/b", "a b", "é", ".hidden"])
    def test_a_task_name_that_cannot_be_one_is_refused(self, name):
        assert repr(name) in message_for("tasks", {name: json.loads(MANIFEST.to_json())["tasks"]["e2e"]}, TaskNameError)

    @pytest.mark.parametrize("parity", [3, "a", [], {}, {"tasks": []}])
    def test_a_certificate_that_is_none_is_refused(self, parity):
        assert message_for("parity", parity).startswith("here: parity: ")

    @pytest.mark.parametrize("text", ["", "{", "nonsense", "\ufeff{}", "[" * 100_000, "1" * 10_000])
    def test_text_that_is_no_json_is_refused(self, text):
        with pytest.raises(BundleError, match=r"^here: expected JSON, found text that is none \("):
            Manifest.from_json(text, "here")

    @pytest.mark.parametrize(("text", "found"), [("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"a"', "str")])
    def test_json_that_is_no_object_is_refused(self, text, found):
        with pytest.raises(BundleError, match=f"^here: expected a JSON object, found {found}$"):
            Manifest.from_json(text, "here")

    @given(text=st.text())
    def test_random_text_is_refused(self, text):
        with pytest.raises(BundleError):
            Manifest.from_json(text, "here")

    @given(
        field=st.sampled_from([*TEXTS, *NUMBERS, *OBJECTS, *LISTS, "parity"]),
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
            max_leaves=8,
        ),
    )
    def test_a_random_value_gives_a_manifest_or_a_library_error(self, field, value):
        try:
            assert isinstance(Manifest.from_json(changed(field, value), "here"), Manifest)
        except (BundleError, TaskNameError) as error:
            assert str(error)  # noqa: PT017 - either outcome is right


class TestTaskNames:
    @pytest.mark.parametrize("name", ["a", "0", "_", "e2e", "E2E", "a.b", "a-b", "v1.0.2", "a_", "a-", "x" * 64])
    def test_a_portable_name_is_taken(self, name):
        check_task_name(name)

    @pytest.mark.parametrize(
        "name",
        NO_NAMES,
    )
    def test_another_name_is_refused(self, name):
        with pytest.raises(TaskNameError, match=r"^task name: expected 1 to 64 letters.*found ") as caught:
            check_task_name(name)
        assert str(caught.value).endswith(repr(name))

    @pytest.mark.parametrize("name", ["e2e", "E2E", "e2E"])
    def test_a_name_that_is_taken_is_refused_also_in_another_case(self, name):
        with pytest.raises(DuplicateTaskError, match=f"task '{name}': there is already 'e2e'; remove it first"):
            check_new_task_name(name, ["xsum", "e2e"])

    @pytest.mark.parametrize("name", ["con", "NUL", "aux.v1", "com1", "Lpt9.x"])
    def test_a_name_that_windows_keeps_for_a_device_is_refused_for_a_new_task(self, name):
        check_task_name(name)  # a bundle that has one is still opened
        with pytest.raises(TaskNameError, match=f"expected one that a file can have on Windows too, found '{name}'"):
            check_new_task_name(name, [])

    @pytest.mark.parametrize("name", ["console", "com", "com10", "lpt", "nul_", "a.con"])
    def test_a_name_that_only_resembles_a_devices_is_taken(self, name):
        check_new_task_name(name, [])

    @pytest.mark.parametrize("name", ["é" * 100_000, ["a" * 100_000]])
    def test_a_message_repeats_little_of_a_long_name(self, name):
        with pytest.raises(TaskNameError) as caught:
            check_task_name(name)
        assert len(str(caught.value)) < 300

    def test_a_name_that_begins_like_another_is_taken(self):
        check_new_task_name("e2e-2", ["e2e"])


class TestChanging:
    ENTRY = TaskEntry(FileEntry("prefixes/new.safetensors", 1, SHA256), 1, 1)

    def test_a_task_is_added_to_a_new_manifest(self):
        added = MANIFEST.with_task("new", self.ENTRY)
        assert (added.tasks["new"], sorted(added.tasks)) == (self.ENTRY, ["e2e", "new", "xsum"])
        assert sorted(MANIFEST.tasks) == ["e2e", "xsum"]

    @pytest.mark.parametrize(("name", "error"), [("E2e", DuplicateTaskError), ("a/b", TaskNameError)])
    def test_a_task_of_a_wrong_name_is_not_added(self, name, error):
        with pytest.raises(error):
            MANIFEST.with_task(name, self.ENTRY)

    def test_a_task_is_removed_with_its_certificate(self):
        removed = MANIFEST.without_task("e2e")
        assert sorted(removed.tasks) == ["xsum"]
        kept = MANIFEST.parity["tasks"]["xsum"]
        assert removed.parity == {"bare_model": {"tolerance": 1e-4}, "tasks": {"xsum": kept}}

    def test_a_task_is_removed_where_there_is_no_certificate(self):
        assert replace(MANIFEST, parity=None).without_task("e2e").parity is None

    def test_removing_what_is_added_gives_the_same(self):
        assert MANIFEST.with_task("new", self.ENTRY).without_task("new") == MANIFEST

    def test_an_unknown_task_is_not_removed_and_the_known_are_listed(self):
        with pytest.raises(UnknownTaskError, match="task 'other': there is none of this name; tasks here: e2e, xsum"):
            MANIFEST.without_task("other")

    def test_of_many_tasks_the_message_lists_some(self):
        with pytest.raises(UnknownTaskError, match=r"tasks here: t0, t1, .* and 9950 more$") as caught:
            replace(MANIFEST, tasks=dict.fromkeys(map("t{}".format, range(10_000)))).without_task("other")
        assert len(str(caught.value)) < 1000

    def test_where_there_are_no_tasks_the_message_says_so(self):
        with pytest.raises(UnknownTaskError, match="tasks here: none"):
            replace(MANIFEST, tasks={}).without_task("other")


@pytest.mark.parametrize("path", ["a", "a/b", "a.b/c-d", ".gitattributes", "prefixes/x.safetensors", "é/ü"])
def test_a_path_inside_is_taken(path):
    check_relative_path(path, "here")


def calls_while(work):
    """Calls of Python's and of C's functions while something is done."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_reading_takes_as_many_steps_for_each_of_many_tasks_as_for_each_of_few():
    def steps(count):
        entries = {f"T{i}": TaskEntry(FileEntry(f"prefixes/T{i}.safetensors", 20, SHA256), 5, 5) for i in range(count)}
        text = replace(MANIFEST, tasks=entries, parity=None).to_json()
        return calls_while(lambda: Manifest.from_json(text, "here"))

    assert steps(400) < 2.1 * steps(200)
