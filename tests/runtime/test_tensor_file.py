"""Tensors as views of a mapped file, compared with torch and with safetensors' own reader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prefix_runtime import PrefixError
from prefix_runtime.tensor_file import TensorFile


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_array_is_a_view_of_the_file(path, dtype):
    save_file({"x": torch.randn(2, 3).to(dtype)}, path)
    file = TensorFile(path)
    first, second = file.array("x"), file.array("x")
    assert first.ctypes.data == second.ctypes.data
    assert not first.flags.owndata


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
