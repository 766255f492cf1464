"""What keys and values are kept in: 8 bits stand for what their scales say, and what they do not reach is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import prefix_runtime
from prefix_runtime import Bundle, BundleError, PrefixMismatchError
from prefix_runtime.prefix.cache_format import CACHE_TYPES, SCALES_NAME, CacheFormat, bfloat16_bits


@pytest.fixture(scope="module")
def shared(workshop):
    return workshop.bundle(cache="int8")


@pytest.fixture
def folder(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "bundle")


@pytest.fixture(scope="module")
def opened(shared):
    bundle = Bundle.open(shared)
    return CacheFormat.of_bundle(bundle.root, "int8", bundle.manifest.geometry)


def test_a_prefix_is_kept_to_half_a_step(shared, opened):
    prefix = Bundle.open(shared).prefix("p20")
    for stored, scale, layer in zip(opened.stored(prefix), opened.scales, prefix.sites["decoder"], strict=True):
        for kept, step, exact in zip(stored, (scale.key, scale.value), (layer.key, layer.value), strict=True):
            assert kept.dtype == np.int8
            assert (np.abs(kept * step - exact) <= 0.51 * step).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_floats_are_kept_as_they_are(make_prefix, dtype):
    prefix = make_prefix()
    for stored, layer in zip(CacheFormat(np.dtype(dtype)).stored(prefix), prefix.sites["decoder"], strict=True):
        assert stored[0] is layer.key
        assert stored[1] is layer.value


def test_bfloat16_is_rounded_as_torch_rounds_it():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 100_000, np.uint32)
    edges = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80000000, 0x00008000, 0x7F7F8000], np.uint32)
    given = np.concatenate([bits, edges]).view(np.float32)
    given = given[np.isfinite(given)]
    expected = torch.from_numpy(given).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bfloat16_bits(given), expected)
    halves = given[np.abs(given) < 60000].astype(np.float16)
    np.testing.assert_array_equal(bfloat16_bits(halves), bfloat16_bits(halves.astype(np.float32)))


def test_a_prefix_is_kept_as_bfloat16s_bits(make_prefix):
    prefix = make_prefix()
    stored = list(CacheFormat(CACHE_TYPES["bf16"]).stored(prefix))
    for (key, value), layer in zip(stored, prefix.sites["decoder"], strict=True):
        assert (key.dtype, key.shape) == (np.uint16, layer.key.shape)
        np.testing.assert_array_equal(value, bfloat16_bits(layer.value))


class TestAddedTasks:
    def test_a_prefix_beyond_the_scales_is_refused_and_nothing_changed(self, folder, make_prefix):
        bundle = Bundle.open(folder)
        alien = make_prefix(4)
        for layer in alien.sites["decoder"]:
            assert layer.key.shape == (4, 4, 16)
        scaled = prefix_runtime.Prefix(
            {"decoder": tuple(type(layer)(layer.key * 100, layer.value) for layer in alien.sites["decoder"])},
            position_base=4,
        )
        message = r"layer 0, key: expected numbers that the bundle's 8-bit cache reaches.*--cache fp32"
        with pytest.raises(PrefixMismatchError, match=message):
            bundle.add_task("alien", scaled)
        with pytest.raises(PrefixMismatchError, match=message):
            prefix_runtime.load(folder).add_task("alien", scaled)
        assert bundle.tasks == ("p20", "p3")

    def test_a_prefix_within_them_is_taken(self, folder, shared):
        bundle = Bundle.open(folder)
        bundle.add_task("again", Bundle.open(shared).prefix("p3"))
        engine = prefix_runtime.load(folder, threads=1)
        found = [engine.generate(token_ids=[5, 6], task=task, max_new_tokens=8).token_ids for task in ("p3", "again")]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.pop("1.value"), r"'1\.value': expected shape \(4, 1, 16\), found none"),
        (lambda tensors: tensors.update({"0.key": np.ones((4, 16), np.float32)}), "expected shape"),
        (lambda tensors: tensors["2.key"].fill(0), "expected numbers above 0"),
        (lambda tensors: tensors["2.key"].fill(np.nan), "expected numbers above 0"),
        (lambda tensors: tensors.update({"0.key": np.ones((4, 1, 16), np.int32)}), "expected float32"),
    ],
)
def test_scales_that_are_none_are_refused(folder, rewrite, tmp_path, spoil, message):
    tensors = {name: np.array(array) for name, array in load_file(folder / SCALES_NAME).items()}
    spoil(tensors)
    save_file(tensors, tmp_path / "spoilt")
    rewrite(folder, SCALES_NAME, (tmp_path / "spoilt").read_bytes())
    with pytest.raises(BundleError, match=message):
        prefix_runtime.load(folder)


def test_a_file_that_is_damaged_is_refused(folder, rewrite):
    rewrite(folder, SCALES_NAME, b"nothing")
    with pytest.raises(BundleError, match=f"{SCALES_NAME}: expected a whole safetensors file"):
        prefix_runtime.load(folder)
