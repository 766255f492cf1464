"""The prefix as a value, and its file: what is refused, and that nothing else ever comes out of a damaged file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import FrozenInstanceError, replace

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from prefix_runtime import BundleIntegrityError, LayerPrefix, Prefix, PrefixError, Source
from prefix_runtime.files import sha256_of_file
from prefix_runtime.prefix.prefix import FORMAT, FORMAT_VERSION, SITES

ZEROS = np.zeros((2, 3, 4), np.float32)
OK = {"format": FORMAT, "format_version": "1", "position_base": "3"}
TENSORS = {f"decoder.{layer}.{part}": ZEROS for layer in range(3) for part in ("key", "value")}
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


def prefix_of(*pairs, **fields):
    return Prefix({"decoder": tuple(LayerPrefix(*pair) for pair in pairs)}, **{"position_base": 3} | fields)


def changed(value, index=(0, 0, 0), dtype=np.float32):
    array = np.zeros((2, 3, 4), dtype)
    array[index] = value
    return array


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task.safetensors"


@pytest.fixture
def saved(path):
    """A small file of two layers with a head, a source and metadata."""
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.normal(size=(2, 1, 3)).astype(np.float32) for _ in "kv") for _ in range(2)]
    prefix_of(
        *pairs,
        position_base=1,
        base_fingerprint="sha256:base",
        source=Source("peft", "ab" * 32),
        head={"bias": np.ones(2, np.float32)},
        metadata={"note": "é"},
    ).save(path)
    return path


class TestValue:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_tells_its_length_dtype_and_size(self, dtype):
        array = ZEROS.astype(dtype)
        prefix = prefix_of((array, array), (array, array))
        assert (prefix.prefix_length, prefix.dtype, prefix.nbytes) == (3, dtype, 4 * array.nbytes)

    def test_layers_may_differ_in_heads_and_head_size(self):
        wide = np.zeros((5, 3, 8), np.float32)
        assert [layer.key.shape for layer in prefix_of((ZEROS, ZEROS), (wide, wide)).sites["decoder"]] == [
            (2, 3, 4),
            (5, 3, 8),
        ]

    @pytest.mark.parametrize("shape", [(), (3,), (3, 4), (1, 2, 3, 4), (0, 3, 4), (2, 0, 4), (2, 3, 0)])
    def test_a_wrong_shape_is_refused(self, shape):
        array = np.zeros(shape, np.float32)
        with pytest.raises(PrefixError, match=r"decoder\.0\.key: expected shape \[num_key_value_heads, .*found \["):
            prefix_of((array, array))

    @pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64, np.uint16, np.bool_, np.complex64, ">f4", object])
    def test_another_dtype_is_refused(self, dtype):
        array = np.zeros((2, 3, 4), dtype)
        message = rf"decoder\.0\.key: expected float32 or float16, found {array.dtype}"
        with pytest.raises(PrefixError, match=message):
            prefix_of((array, array))

    def test_layers_of_different_dtypes_are_refused(self):
        half = ZEROS.astype(np.float16)
        with pytest.raises(PrefixError, match=r"decoder\.1\.key: expected float32 .*found float16"):
            prefix_of((ZEROS, ZEROS), (half, half))

    @pytest.mark.parametrize("where", [(0, "value"), (1, "key"), (1, "value")])
    def test_layers_of_different_lengths_are_refused(self, where):
        layer, part = where
        pairs = [[ZEROS, ZEROS], [ZEROS, ZEROS]]
        pairs[layer][part == "value"] = np.zeros((2, 7, 4), np.float32)
        with pytest.raises(PrefixError, match=rf"decoder\.{layer}\.{part}: expected prefix length 3.*found 7"):
            prefix_of(*pairs)

    def test_sites_of_different_lengths_are_refused(self):
        longer = np.zeros((2, 5, 4), np.float32)
        sites = {"decoder": (LayerPrefix(ZEROS, ZEROS),), "cross": (LayerPrefix(longer, longer),)}
        with pytest.raises(PrefixError, match=r"cross\.0\.key: expected prefix length 3.*found 5"):
            Prefix(sites, position_base=3)

    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    @pytest.mark.parametrize(("layer", "part"), [(0, "key"), (1, "value")])
    def test_a_number_that_is_not_finite_is_refused_by_tensor_and_index(self, number, dtype, layer, part):
        pairs = [[ZEROS.astype(dtype)] * 2 for _ in range(2)]
        pairs[layer][part == "value"] = changed(number, (1, 2, 3), dtype)
        with pytest.raises(PrefixError, match=rf"decoder\.{layer}\.{part}: .*finite.*found {number} at \[1, 2, 3\]"):
            prefix_of(*pairs)

    def test_a_head_that_is_not_finite_is_refused(self):
        with pytest.raises(PrefixError, match=r"head\.bias: expected finite.*found nan at \[1\]"):
            prefix_of((ZEROS, ZEROS), head={"bias": np.array([0, np.nan], np.float32)})

    @pytest.mark.parametrize("dtype", [np.float64, np.int64])
    def test_a_head_that_its_file_cannot_hold_is_refused(self, dtype):
        with pytest.raises(PrefixError, match=r"head\.bias: expected float32 or float16, found (float|int)64"):
            prefix_of((ZEROS, ZEROS), head={"bias": np.zeros(2, dtype)})

    @pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": None}])
    def test_metadata_that_is_no_text_is_refused(self, metadata):
        with pytest.raises(PrefixError, match="metadata: expected texts by name, found"):
            prefix_of((ZEROS, ZEROS), metadata=metadata)

    @pytest.mark.parametrize("base", [0, 3, np.int64(3)])
    def test_the_text_begins_at_0_or_behind_the_prefix(self, base):
        prefix = prefix_of((ZEROS, ZEROS), position_base=base)
        assert prefix.position_base == base
        assert type(prefix.position_base) is int

    @pytest.mark.parametrize("base", [1, 2, 4, -3, 3.0, True, False, "3", None])
    def test_another_position_base_is_refused(self, base):
        with pytest.raises(PrefixError, match=f"position_base: expected 0 or the prefix length 3, found {base!r}"):
            prefix_of((ZEROS, ZEROS), position_base=base)

    @pytest.mark.parametrize(
        ("sites", "found"),
        [({}, "none"), ({"decoder": ()}, "none"), ({"attention": (LayerPrefix(ZEROS, ZEROS),)}, "attention")],
    )
    def test_no_layers_or_an_unknown_site_are_refused(self, sites, found):
        with pytest.raises(PrefixError, match=f"at the sites decoder, cross, encoder, found .*{found}"):
            Prefix(sites, position_base=3)

    def test_describe_tells_what_a_person_asks_for(self, make_prefix):
        told = make_prefix(5, base_fingerprint="sha256:base", source=Source("peft", "00")).describe()
        assert {key: told[key] for key in ("layers", "key/value heads", "head size", "prefix length")} == {
            "layers": "3",
            "key/value heads": "4",
            "head size": "16",
            "prefix length": "5",
        }
        assert (told["base model"], told["source"], told["dtype"]) == ("sha256:base", "peft", "float32")


class TestImmutability:
    def test_arrays_are_read_only(self):
        prefix = prefix_of((ZEROS, ZEROS), head={"bias": np.ones(2, np.float32)})
        for array in (prefix.sites["decoder"][0].key, prefix.sites["decoder"][0].value, prefix.head["bias"]):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1

    @pytest.mark.parametrize("given_as", [lambda a: a, lambda a: a[:], lambda a: a.transpose(1, 0, 2)])
    @pytest.mark.parametrize("read_only", [False, True])
    def test_a_later_change_of_the_callers_array_has_no_effect(self, given_as, read_only):
        own = np.zeros((3, 3, 4), np.float32)
        view = given_as(own).view()
        view.flags.writeable = not read_only
        prefix = prefix_of((view, view), head={"bias": view})
        own[:] = 9
        assert not prefix.sites["decoder"][0].key.any()
        assert not prefix.sites["decoder"][0].value.any()
        assert not prefix.head["bias"].any()

    def test_the_callers_array_stays_writable(self):
        own = np.zeros((2, 3, 4), np.float32)
        prefix_of((own, own))
        own[0] = 1

    def test_a_later_change_of_the_callers_mappings_has_no_effect(self):
        sites, metadata = {"decoder": (LayerPrefix(ZEROS, ZEROS),)}, {"a": "b"}
        prefix = Prefix(sites, position_base=3, metadata=metadata)
        sites.clear()
        metadata["a"] = "c"
        assert (list(prefix.sites), dict(prefix.metadata)) == (["decoder"], {"a": "b"})

    @pytest.mark.parametrize("name", ["sites", "head", "metadata"])
    def test_mappings_cannot_be_changed(self, name):
        with pytest.raises(TypeError, match="does not support item assignment"):
            getattr(prefix_of((ZEROS, ZEROS)), name)["decoder"] = ()

    def test_fields_cannot_be_assigned(self):
        with pytest.raises(FrozenInstanceError):
            prefix_of((ZEROS, ZEROS)).position_base = 0


class TestEquality:
    def test_equal_content_is_equal_whatever_the_memory_layout(self):
        key = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        strided = key.transpose(2, 1, 0).copy().transpose(2, 1, 0)
        assert not strided.flags.c_contiguous
        one, other = prefix_of((key, key)), prefix_of((strided, strided))
        assert one == other
        assert len({one, other}) == 1

    @pytest.mark.parametrize(
        "other",
        [
            prefix_of((changed(1), ZEROS)),
            prefix_of((ZEROS, changed(1))),
            prefix_of((ZEROS, ZEROS), (ZEROS, ZEROS)),
            prefix_of((ZEROS.astype(np.float16), ZEROS.astype(np.float16))),
            prefix_of((ZEROS.reshape(4, 3, 2), ZEROS.reshape(4, 3, 2))),
            prefix_of((ZEROS, ZEROS), position_base=0),
            prefix_of((ZEROS, ZEROS), base_fingerprint="x"),
            prefix_of((ZEROS, ZEROS), source=Source("peft", "0")),
            prefix_of((ZEROS, ZEROS), head={"bias": np.zeros(1, np.float32)}),
            prefix_of((ZEROS, ZEROS), metadata={"a": "b"}),
            Prefix({"encoder": (LayerPrefix(ZEROS, ZEROS),)}, position_base=3),
        ],
    )
    def test_any_difference_makes_them_unequal(self, other):
        prefix = prefix_of((ZEROS, ZEROS))
        assert prefix != other
        assert prefix.content_hash != other.content_hash

    def test_a_prefix_equals_nothing_else(self):
        assert prefix_of((ZEROS, ZEROS)) != "prefix"

    def test_the_hash_survives_another_order_of_names(self):
        one, two = np.ones(1, np.float32), np.zeros(2, np.float32)
        first = prefix_of((ZEROS, ZEROS), head={"a": one, "b": two}, metadata={"a": "1", "b": "2"})
        second = prefix_of((ZEROS, ZEROS), head={"b": two, "a": one}, metadata={"b": "2", "a": "1"})
        assert hash(first) == hash(second)


def finite(dtype, shape):
    width = np.dtype(dtype).itemsize * 8
    return arrays.arrays(dtype, shape, elements=st.floats(width=width, allow_nan=False, allow_infinity=False))


@st.composite
def prefixes(draw):
    dtype, length = draw(st.sampled_from([np.float32, np.float16])), draw(st.integers(1, 3))
    shape = st.tuples(st.integers(1, 3), st.just(length), st.integers(1, 3))
    layer = st.builds(LayerPrefix, *[shape.flatmap(lambda shape: finite(dtype, shape))] * 2)
    sites = st.dictionaries(st.sampled_from(SITES), st.lists(layer, min_size=1, max_size=3).map(tuple), min_size=1)
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    head = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3).flatmap(lambda s: finite(np.float32, s))
    return Prefix(
        draw(sites),
        draw(st.sampled_from([0, length])),
        draw(st.none() | text.filter(bool)),
        draw(st.none() | st.builds(Source, text, text)),
        draw(st.dictionaries(text, head, max_size=2)),
        draw(st.dictionaries(text, text, max_size=2)),
    )


class TestFile:
    @SHARED_FOLDER
    @given(prefix=prefixes())
    def test_what_is_loaded_is_what_was_saved(self, prefix, path):
        prefix.save(path)
        loaded = Prefix.load(path)
        assert loaded == prefix
        for name in ("position_base", "base_fingerprint", "source", "metadata"):
            assert getattr(loaded, name) == getattr(prefix, name)
        assert loaded.sites.keys() == prefix.sites.keys()
        for site, layers in prefix.sites.items():
            for found, layer in zip(loaded.sites[site], layers, strict=True):
                assert found.key.dtype == layer.key.dtype
                np.testing.assert_array_equal(found.key, layer.key)
                np.testing.assert_array_equal(found.value, layer.value)
        assert loaded.head.keys() == prefix.head.keys()
        for name, array in prefix.head.items():
            np.testing.assert_array_equal(loaded.head[name], array, strict=True)

    def test_its_layout_is_the_documented_one_to_safetensors_own_reader(self, saved):
        with safe_open(str(saved), framework="np") as file:
            names = [f"decoder.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
            assert sorted(file.keys()) == sorted([*names, "head.bias"])
            assert file.metadata() == {
                "format": "prefix-export.prefix",
                "format_version": "1",
                "position_base": "1",
                "base_fingerprint": "sha256:base",
                "source_format": "peft",
                "source_sha256": "ab" * 32,
                "metadata": json.dumps({"note": "é"}),
            }
            np.testing.assert_array_equal(
                file.get_tensor("decoder.1.value"), Prefix.load(saved).sites["decoder"][1].value
            )

    def test_loaded_arrays_are_read_only_views_of_one_piece_of_memory(self, saved):
        layers = Prefix.load(saved).sites["decoder"]
        arrays = [array for layer in layers for array in (layer.key, layer.value)]
        assert not any(array.flags.owndata or array.flags.writeable for array in arrays)
        addresses = [array.ctypes.data for array in arrays]
        assert max(addresses) - min(addresses) < saved.stat().st_size

    def test_a_loaded_prefix_is_compared_with_a_hash_that_is_given(self, saved):
        assert Prefix.load(saved, sha256_of_file(saved)) == Prefix.load(saved)
        with pytest.raises(BundleIntegrityError, match=f"^{saved}: expected SHA-256 {'0' * 64}, found "):
            Prefix.load(saved, "0" * 64)

    def test_saving_replaces_the_file_and_what_was_loaded_before_stays(self, saved, make_prefix):
        before = Prefix.load(saved)
        content = before.content_hash
        make_prefix().save(saved)
        assert replace(before).content_hash == content
        assert Prefix.load(saved) == make_prefix()

    def test_saving_leaves_nothing_else_behind(self, saved):
        assert list(saved.parent.iterdir()) == [saved]

    def test_the_description_of_a_loaded_prefix_is_that_of_the_saved(self, path):
        wide = np.zeros((5, 3, 8), np.float32)
        sites = {"decoder": (LayerPrefix(ZEROS, ZEROS),) * 2, "cross": (LayerPrefix(wide, wide),)}
        prefix = Prefix(sites, position_base=0)
        prefix.save(path)
        assert Prefix.load(path).describe() == prefix.describe()


class TestWrongFile:
    @pytest.mark.parametrize(
        ("make", "found"),
        [
            (lambda path: None, "no such file"),
            (lambda path: path.mkdir(), "a folder"),
            (lambda path: path.write_bytes(b""), "too small"),
            (lambda path: path.write_bytes(b"not a tensor in sight, and longer than a header's length"), "header"),
            (lambda path: path.symlink_to(path), "symbolic links"),
        ],
        ids=["missing", "folder", "empty", "text", "loop"],
    )
    def test_what_is_no_file_of_tensors_is_refused(self, path, make, found):
        make(path)
        with pytest.raises(PrefixError, match=f"^{path}: expected a whole safetensors file, found .*{found}"):
            Prefix.load(path)

    @pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "a" * 300])
    def test_a_path_that_cannot_be_one_is_refused(self, tmp_path, name):
        with pytest.raises(PrefixError, match="expected a whole safetensors file, found"):
            Prefix.load(tmp_path / name)

    def test_a_file_that_may_not_be_read_is_refused(self, saved, as_nobody):
        saved.chmod(0)
        with as_nobody(), pytest.raises(PrefixError, match=f"^{saved}: expected .*, found permission denied"):
            Prefix.load(saved)

    @pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "prefix-export.bundle"}])
    def test_another_kind_of_safetensors_file_is_refused(self, path, metadata):
        save_file(TENSORS, path, metadata=metadata)
        found = (metadata or {}).get("format")
        with pytest.raises(PrefixError, match=rf"^{path}: expected a prefix file .*{FORMAT}.*found format {found!r}"):
            Prefix.load(path)

    @pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 999, 0])
    def test_a_newer_format_version_is_refused(self, path, version):
        save_file(TENSORS, path, metadata={**OK, "format_version": str(version)})
        with pytest.raises(PrefixError, match=f"^{path}: expected format version 1 .*found {version}; update"):
            Prefix.load(path)

    @pytest.mark.parametrize("key", ["format_version", "position_base"])
    @pytest.mark.parametrize("text", ["", "-1", "1.0", "one", "٣", " 3", "9" * 10, None])
    def test_a_number_that_is_none_is_refused(self, path, key, text):
        metadata = {**OK, key: text} if text is not None else {name: OK[name] for name in OK if name != key}
        save_file(TENSORS, path, metadata=metadata)
        with pytest.raises(PrefixError, match=f"^{path}: metadata {key}: expected a whole number, found"):
            Prefix.load(path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', '{"a": null}', "[" * 100_000])
    def test_metadata_that_is_no_object_of_texts_is_refused(self, path, text):
        save_file(TENSORS, path, metadata={**OK, "metadata": text})
        with pytest.raises(PrefixError, match=f"^{path}: metadata: expected a JSON object"):
            Prefix.load(path)

    @pytest.mark.parametrize("missing", ["decoder.0.key", "decoder.1.value", "decoder.2.key"])
    def test_a_layer_without_key_or_value_is_refused(self, path, missing):
        save_file({name: TENSORS[name] for name in TENSORS if name != missing}, path, metadata=OK)
        layer = missing.split(".")[1]
        with pytest.raises(PrefixError, match=f"a key and a value for each of the 3 layers.*layer {layer} incomplete"):
            Prefix.load(path)

    def test_a_missing_layer_is_refused(self, path):
        save_file({name: TENSORS[name] for name in TENSORS if ".1." not in name}, path, metadata=OK)
        with pytest.raises(PrefixError, match="each of the 2 layers of decoder, found layer 1 incomplete"):
            Prefix.load(path)

    @pytest.mark.parametrize(
        "name", ["decoder.00.key", "decoder.-1.key", "decoder.0.query", "encoder.0", "lm_head", "decoder.99999.key"]
    )
    def test_a_tensor_of_another_name_is_refused(self, path, name):
        save_file({**TENSORS, name: ZEROS}, path, metadata=OK)
        with pytest.raises(PrefixError, match=rf"^{path}: expected tensors like 'decoder.0.key', found '{name}'"):
            Prefix.load(path)

    def test_a_file_without_tensors_is_refused(self, path):
        save_file({}, path, metadata=OK)
        with pytest.raises(PrefixError, match=f"^{path}: expected at least one layer"):
            Prefix.load(path)

    @pytest.mark.parametrize("dtype", [np.float64, np.int32, np.bool_])
    def test_tensors_of_another_dtype_are_refused(self, path, dtype):
        save_file({name: array.astype(dtype) for name, array in TENSORS.items()}, path, metadata=OK)
        with pytest.raises(PrefixError, match=f"^{path}: tensor 'decoder.0.key': expected float32, .*found"):
            Prefix.load(path)

    @pytest.mark.parametrize("number", [np.nan, np.inf])
    def test_a_file_with_a_number_that_is_not_finite_is_refused(self, path, number):
        save_file({**TENSORS, "decoder.2.key": changed(number, (0, 1, 2))}, path, metadata=OK)
        with pytest.raises(PrefixError, match=rf"^{path}: decoder\.2\.key: .*finite.*found {number} at \[0, 1, 2\]"):
            Prefix.load(path)

    def test_a_truncated_file_is_refused_at_every_length(self, saved):
        content = saved.read_bytes()
        for length in range(len(content)):
            saved.write_bytes(content[:length])
            with pytest.raises(PrefixError, match=f"^{saved}: expected a whole safetensors file"):
                Prefix.load(saved)

    def test_a_file_with_more_at_its_end_is_refused(self, saved):
        saved.write_bytes(saved.read_bytes() + b"\0")
        with pytest.raises(PrefixError, match="expected a whole safetensors file"):
            Prefix.load(saved)

    @pytest.mark.parametrize("flip", [1, 32, 128])
    def test_a_flipped_bit_gives_another_prefix_or_a_prefix_error(self, saved, flip):
        content, original = saved.read_bytes(), Prefix.load(saved).content_hash
        data = 8 + int.from_bytes(content[:8], "little")
        loaded = 0
        for index in range(len(content)):
            damaged = bytearray(content)
            damaged[index] ^= flip
            saved.write_bytes(damaged)
            try:
                found = Prefix.load(saved)
            except PrefixError:
                continue
            loaded += 1
            assert index < data or found.content_hash != original
        assert 0 < loaded < len(content)

    @SHARED_FOLDER
    @given(content=st.binary(max_size=200))
    def test_random_bytes_are_refused(self, path, content):
        path.write_bytes(content)
        with pytest.raises(PrefixError):
            Prefix.load(path)

    @SHARED_FOLDER
    @given(header=st.recursive(st.none() | st.integers() | st.text(), lambda s: st.dictionaries(st.text(), s)))
    def test_a_random_header_is_refused(self, path, header):
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(PrefixError):
            Prefix.load(path)

    @SHARED_FOLDER
    @given(metadata=st.dictionaries(st.sampled_from([*OK, "metadata", "source_format"]), st.text(max_size=5)))
    def test_random_metadata_gives_a_prefix_or_a_prefix_error(self, path, metadata):
        save_file(TENSORS, path, metadata={**OK, **metadata})
        try:
            assert Prefix.load(path).prefix_length == 3
        except PrefixError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017 - either outcome is right

    def test_the_content_hash_is_that_of_the_content(self):
        # What the hash covers is part of the format: other versions must find the same.
        header = {"format": FORMAT, "format_version": "1", "position_base": "3", "metadata": "{}"}
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for part in ("key", "value"):
            digest.update(f"decoder.0.{part}<f4(2, 3, 4)".encode() + bytes(ZEROS))
        assert prefix_of((ZEROS, ZEROS)).content_hash == digest.hexdigest()
