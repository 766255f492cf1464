"""Tensors of safetensors files, compared with torch and with safetensors' own reader; what is none is refused."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize

from prefix_runtime import PrefixError
from prefix_runtime.prefix.tensor_file import TensorFile

torch = pytest.importorskip("torch", reason="what is expected comes from torch")
load_file, save_file = (getattr(pytest.importorskip("safetensors.torch"), name) for name in ("load_file", "save_file"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tensors.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 4), (0, 3)])
def test_a_tensor_is_what_torch_reads(path, dtype, shape):
    save_file({"odd": torch.ones(3, dtype=torch.int8), "x": torch.randn(shape).to(dtype)}, path)
    expected = load_file(path)["x"]
    expected = (expected.float() if dtype == torch.bfloat16 else expected).numpy()
    np.testing.assert_array_equal(TensorFile(path).array("x"), expected, strict=True)


def test_every_bfloat16_is_widened_as_torch_widens_it(path):
    # Every bit pattern there is, subnormal numbers, infinities and NaN among them.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    save_file({"x": every}, path)
    found = TensorFile(path).array("x")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.int32), every.float().view(torch.int32).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_array_stays_what_it_is_when_its_file_is_shortened(path, dtype, python):
    save_file({"x": torch.ones(5000).to(dtype)}, path)
    # Of a mapped file the process would be killed by SIGBUS.
    code = """
import os, sys
from prefix_runtime.prefix.tensor_file import TensorFile
array = TensorFile(sys.argv[1]).array("x")
os.truncate(sys.argv[1], 0)
print(float(array.astype("f4").sum()))
"""
    run = python(code, path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "5000.0\n", "")


def test_a_file_that_is_shortened_before_it_is_read_is_an_error(path):
    save_file({"x": torch.ones(5000)}, path)
    file = TensorFile(path)
    os.truncate(path, 1000)
    with pytest.raises(PrefixError, match=r"tensor 'x': expected its bytes, found its end .*: the file was shortened$"):
        file.array("x")


def test_all_tensors_are_of_the_file_that_was_opened(path):
    save_file({"x": torch.ones(4), "y": torch.ones(4)}, path)
    file = TensorFile(path)
    other = path.with_name("other")
    save_file({"x": torch.zeros(4), "y": torch.zeros(4)}, other)
    other.replace(path)
    assert file.array("y").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_array_is_read_only(path, dtype):
    save_file({"x": torch.randn(2, 3).to(dtype)}, path)
    with pytest.raises(ValueError, match="read-only"):
        TensorFile(path).array("x")[0, 0] = 1


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "F64"),
        (torch.int64, "I64"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_another_dtype_is_refused(path, dtype, name):
    save_file({"x": torch.zeros(2).to(dtype)}, path)
    file = TensorFile(path)
    assert file.tensors["x"].dtype == name
    with pytest.raises(PrefixError, match=f"^{path}: tensor 'x': expected float32, float16 or bfloat16, found {name}"):
        file.array("x")


def test_the_header_is_told(path):
    save_file({"x": torch.zeros(2, 3), "y": torch.zeros(5).half()}, path, metadata={"format": "pt"})
    file = TensorFile(path)
    assert file.metadata == {"format": "pt"}
    assert {name: info.shape for name, info in file.tensors.items()} == {"x": (2, 3), "y": (5,)}


def test_a_file_without_metadata_has_none(path):
    save_file({"x": torch.zeros(2)}, path)
    assert TensorFile(path).metadata == {}


def test_an_array_outlives_its_file(path):
    save_file({"x": torch.ones(4)}, path)
    array = TensorFile(path).array("x")
    path.unlink()
    assert array.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.write_bytes(b""), "too small"),
        (lambda path: path.write_bytes(b"\xff" * 64), "a header of 18446744073709551615 bytes"),
        (lambda path: path.write_bytes(b"\x80\x02}q\x00." * 20), "header"),
    ],
    ids=["missing", "folder", "empty", "ones", "pickle"],
)
def test_what_is_no_safetensors_file_is_refused(path, make, found):
    make(path)
    with pytest.raises(PrefixError, match=f"^{path}: expected a whole safetensors file, found .*{found}"):
        TensorFile(path)


@pytest.mark.parametrize(
    "header",
    [
        '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,16]}}',
        '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        '{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
        '{"x":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        '{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
        '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        '{"x":{"dtype":"X99","shape":[2],"data_offsets":[0,8]}}',
        '{"x":{"dtype":"F32","data_offsets":[0,8]}}',
        '{"x":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,8]}}',
    ],
    ids=["beyond the end", "too short", "backwards", "a hole", "negative", "overlap", "dtype", "no shape", "overflow"],
)
def test_a_header_that_does_not_fit_its_bytes_is_refused(path, header):
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(PrefixError, match=f"^{path}: expected a whole safetensors file, found"):
        TensorFile(path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_regular_file_is_neither_waited_for_nor_read(path, make, no_hang):
    make(path)
    with no_hang, pytest.raises(PrefixError, match=f"^{path}: expected a whole safetensors file, found not a regular"):
        TensorFile(path)


@pytest.mark.parametrize(
    "shape", [[1] * 65, [0, 2**62], [2**62, 0], [0] * 65, [2**63, 0], [0, 2**64 - 1]], ids=lambda shape: str(shape)[:20]
)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_shape_that_no_array_has_is_refused(path, shape, dtype):
    size = 0 if 0 in shape else {"F32": 4}.get(dtype, 2)
    write(path, {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, bytes(size))
    message = f"^{path}: tensor 'x': expected a shape that an array can have, found "
    with pytest.raises(PrefixError, match=message) as caught:
        TensorFile(path).array("x")
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize("shape", [[0], [3, 0], [0, 5, 0]])
def test_a_tensor_of_nothing_has_its_shape(path, shape):
    write(path, {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, b"")
    assert TensorFile(path).array("x").shape == tuple(shape)


def write(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_it_takes_what_the_library_takes_and_refuses_what_that_refuses(path):
    """Of files that were changed at random, all the ways that a header can be wrong among them."""
    chance = random.Random(0)
    values = [0, 1, 2, 4, 8, 16, -1, 2**62, 2**64, 1.0, True, None, "F32", "F64", "F4", "U8", "X"]
    values += [[], [0, 8], [8, 16], {}]
    taken = refused = 0
    for _ in range(4000):
        header = {
            "__metadata__": {"a": "b"},
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F16", "shape": [2, 2], "data_offsets": [8, 16]},
        }
        for _ in range(chance.randint(0, 2)):
            entry = header[chance.choice(list(header))]
            key = chance.choice([*entry, "more"])
            if isinstance(entry.get(key), list) and entry[key] and chance.random() < 0.6:
                entry[key][chance.randrange(len(entry[key]))] = chance.choice(values)
            elif chance.random() < 0.2:
                entry.pop(key, None)
            else:
                entry[key] = chance.choice(values)
        write(path, header, bytes(16 + chance.choice([0, 0, 0, 0, 1, -1])))
        content = path.read_bytes()
        if chance.random() < 0.2:
            content = bytearray(content)
            content[chance.randrange(len(content) - 16)] = chance.choice(b'0129{}[]",:\x00\xff')
            path.write_bytes(content)
        try:
            expected = {name: tuple(entry["shape"]) for name, entry in deserialize(bytes(content))}
        except SafetensorError:
            refused += 1
            with pytest.raises(PrefixError):
                TensorFile(path)
            continue
        taken += 1
        assert {name: info.shape for name, info in TensorFile(path).tensors.items()} == expected
    assert min(taken, refused) > 500
