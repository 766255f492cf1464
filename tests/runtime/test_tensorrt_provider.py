"""onnxruntime's TensorRT providers: what they are told, and what is said where they are not there."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnxruntime as ort
import pytest

import prefix_runtime
from prefix_runtime import Bundle, BundleError, ProviderError
from prefix_runtime.backends.onnxruntime import backend
from prefix_runtime.backends.onnxruntime.session import Session
from prefix_runtime.backends.onnxruntime.tensorrt_provider import add_plugin, provider_options
from prefix_runtime.bundle.folder import MANIFEST_NAME

NAME = "NvTensorRTRTXExecutionProvider"


@pytest.fixture
def opened(bundle):
    """A bundle whose manifest says that its graph is of standard operators; the graph itself is not run here."""
    path = bundle / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"flavour": "portable", "target": "tensorrt"}))
    return Bundle.open(bundle)


def parsed(text):
    return {name: tuple(map(int, sizes.split("x"))) for name, sizes in (each.split(":") for each in text.split(","))}


@pytest.mark.parametrize(("provider", "prefix"), [("tensorrt", "trt"), ("tensorrt-rtx", "nv")])
def test_the_ranges_cover_prompts_and_decode_steps(opened, tmp_path, provider, prefix):
    options = provider_options(provider, opened, tmp_path / "kept", max_batch=4)
    least, usual, most = (parsed(options[f"{prefix}_profile_{word}_shapes"]) for word in ("min", "opt", "max"))
    given = {each.name for each in ort.InferenceSession(opened.graph_path).get_inputs()}
    assert least.keys() == usual.keys() == most.keys() == given
    assert (least["input_ids"], usual["input_ids"], most["input_ids"]) == ((1, 1), (1, 1), (4, 319))
    assert (least["attention_mask"], most["attention_mask"]) == ((1, 1), (4, 638))
    assert least["past_key_values.1.key"] == (1, 4, 0, 16)
    assert most["past_key_values.1.key"] == (4, 4, 319, 16)
    assert (least["num_logits_to_keep"], most["num_logits_to_keep"]) == ((0,), (319,))


def test_what_is_built_is_kept_in_the_users_folder(opened, tmp_path):
    folder = tmp_path / "kept"
    options = provider_options("tensorrt", opened, folder)
    assert (options["trt_engine_cache_enable"], options["trt_engine_cache_path"]) == ("1", str(folder))
    assert (options["trt_timing_cache_enable"], options["trt_timing_cache_path"]) == ("1", str(folder))
    assert provider_options("tensorrt-rtx", opened, folder)["nv_runtime_cache_path"] == str(folder)


@pytest.mark.parametrize("is_opened", [True, False])
def test_that_folder_is_there_when_a_session_is_opened_and_goes_if_none_is(opened, monkeypatch, tmp_path, is_opened):
    monkeypatch.setenv("PREFIX_RUNTIME_CACHE", str(tmp_path / "cache"))
    folders = []

    def opens(path, *_, provider_options):
        folders.append(Path(provider_options["trt_engine_cache_path"]))
        assert folders[0].is_dir()
        if not is_opened:
            raise ProviderError("no GPU")
        return Session(path)

    monkeypatch.setattr(backend, "Session", opens)
    monkeypatch.setattr(backend, "check_provider", lambda provider: None)
    with nullcontext() if is_opened else pytest.raises(ProviderError, match="no GPU"):
        prefix_runtime.load(opened.root, provider="tensorrt")
    assert folders[0].is_relative_to(tmp_path / "cache")
    assert folders[0].exists() == is_opened


def test_a_graph_of_the_fast_flavour_is_refused(shared_bundle, tmp_path):
    with pytest.raises(BundleError, match=r"expected a graph in standard operators.*--target tensorrt"):
        provider_options("tensorrt", Bundle.open(shared_bundle), tmp_path)


def test_an_onnxruntime_without_the_provider_says_what_to_install(opened):
    with pytest.raises(
        ProviderError, match=r"'tensorrt': this onnxruntime has only .*pip install onnxruntime-gpu tensorrt"
    ):
        prefix_runtime.load(opened.root, provider="tensorrt")


def test_a_missing_plugin_is_named(opened, monkeypatch, tmp_path):
    monkeypatch.setenv("PREFIX_RUNTIME_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(ProviderError, match=r"plug-in for TensorRT for RTX, found none; pip install onnxruntime-ep-nv"):
        prefix_runtime.load(opened.root, provider="tensorrt-rtx")


class StandInOrt:
    """As much of onnxruntime as registers plug-ins; so many GPUs are found once it is registered."""

    def __init__(self, gpus):
        self._gpus, self.registered = gpus, []

    def register_execution_provider_library(self, name, path):
        self.registered.append((name, path))

    def get_ep_devices(self):
        own = [SimpleNamespace(ep_name=NAME, number=number) for number in range(self._gpus)] if self.registered else []
        return [SimpleNamespace(ep_name="CPUExecutionProvider"), *own]


@pytest.fixture
def plugin(monkeypatch):
    found = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    found.get_ep_name, found.get_library_path = lambda: NAME, lambda: "/the/library.so"
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", found)


@pytest.mark.usefixtures("plugin")
def test_a_plugin_is_registered_once_and_given_a_gpu_and_the_options():
    runtime, added = StandInOrt(2), []
    session_options = SimpleNamespace(
        add_provider_for_devices=lambda devices, options: added.append((devices, options))
    )
    add_plugin(runtime, session_options, {"a": "1"})
    add_plugin(runtime, session_options, {"b": "2"}, index=1)
    assert runtime.registered == [(NAME, "/the/library.so")]
    assert [([device.number for device in devices], options) for devices, options in added] == [
        ([0], {"a": "1"}),
        ([1], {"b": "2"}),
    ]


@pytest.mark.usefixtures("plugin")
def test_a_plugin_that_does_not_load_says_why():
    # As onnxruntime 1.32 does with NVIDIA's plug-in 0.5 on a machine without a driver.
    runtime = StandInOrt(1)

    def fail(name, path):
        raise RuntimeError(f"Failed to load library {path} of {name} with error: libcuda.so.1: cannot open")

    runtime.register_execution_provider_library = fail
    with pytest.raises(ProviderError, match=r"needs NVIDIA's driver, found: Failed to load library .* libcuda"):
        add_plugin(runtime, SimpleNamespace(), {})


@pytest.mark.usefixtures("plugin")
def test_a_machine_without_an_rtx_gpu_is_told_so():
    with pytest.raises(ProviderError, match=r"expected an RTX GPU \(Ampere or later\) with NVIDIA's driver, found 0"):
        add_plugin(StandInOrt(0), SimpleNamespace(), {})
