"""Mapped files: views, dtypes, closing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.samples import entry, framed
from uqff import FormatError, UnsupportedError
from uqff.container.framing import DTYPE_BITS
from uqff.container.mapped import MappedFile, TensorMap

TORCH = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U16": torch.uint16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "C64": torch.complex64,
    "F64": torch.float64,
    "U64": torch.uint64,
}


def write(path: Path, *tensors: tuple[str, str, list[int], bytes]) -> MappedFile:
    fields, at, data = {}, 0, b""
    for name, dtype, shape, raw in tensors:
        fields[name] = entry(len(raw), at, dtype=dtype, shape=shape)
        at += len(raw)
        data += raw
    path.write_bytes(framed(fields, data))
    return MappedFile(path)


@pytest.mark.parametrize("dtype", TORCH)
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    """Every dtype torch has, at an offset that may not be aligned, with its bits."""
    raw = bytes([1, 0] * (DTYPE_BITS[dtype] // 8))
    for pad in range(3):
        file = write(tmp_path / "t", ("pad", "U8", [pad], bytes(pad)), ("t", dtype, [2, 1], raw))
        tensor = TensorMap([file])["t"]
        assert tensor.dtype is TORCH[dtype]
        assert tuple(tensor.shape) == (2, 1)
        assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == raw


def test_aligned_tensors_are_views(tmp_path: Path) -> None:
    """Two requests share memory."""
    file = write(tmp_path / "t", ("t", "U8", [4], b"1234"))
    tensors = TensorMap([file])
    assert tensors["t"].data_ptr() == tensors["t"].data_ptr()
    assert tensors["t"].data_ptr() == np.frombuffer(file.view, np.uint8)[-4:].__array_interface__["data"][0]


def test_narrow_floats_are_unsupported_one_by_one(tmp_path: Path) -> None:
    """A tensor that torch has no dtype for does not keep the others from being read."""
    file = write(tmp_path / "t", ("f4", "F4", [2], b"x"), ("u8", "U8", [1], b"y"))
    tensors = TensorMap([file])
    assert tensors["u8"].tolist() == [ord("y")]
    with pytest.raises(UnsupportedError, match="torch has no such dtype") as caught:
        tensors["f4"]
    assert (caught.value.field, caught.value.got) == ("f4", "F4")


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    """No dimensions, and dimensions of zero."""
    tensors = TensorMap([write(tmp_path / "t", ("s", "I32", [], b"\7\0\0\0"), ("e", "F32", [0, 3], b""))])
    assert tensors["s"].shape == ()
    assert tensors["s"].item() == 7
    assert tensors["e"].shape == (0, 3)
    assert len(tensors) == 2


def test_tensor_in_two_files(tmp_path: Path) -> None:
    """Readers would disagree on which of them counts."""
    files = [write(tmp_path / name, ("t", "U8", [1], b"x")) for name in "ab"]
    with pytest.raises(FormatError, match="tensor occurs in two files"):
        TensorMap(files)


def test_close(tmp_path: Path) -> None:
    """Closing twice is fine; reading afterwards is an error of its own; views stay valid."""
    file = write(tmp_path / "t", ("t", "U8", [4], b"1234"))
    tensors = TensorMap([file])
    view = tensors["t"]
    file.close()
    file.close()
    with pytest.raises(ValueError, match="file is closed"):
        tensors["t"]
    assert bytes(view.numpy()) == b"1234"
