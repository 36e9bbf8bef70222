"""Mapped files: views, dtypes, closing."""

from __future__ import annotations

import gc
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import uqff
from tests.support import samples
from tests.support.samples import BLOB, entry, framed
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


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    """To look at pages that are gone would end the process without a word."""
    path = samples.write(tmp_path / "a.uqff", {"0": BLOB, "1": BLOB})
    with uqff.open(path) as file:
        assert bytes(file.blob(1)) == BLOB
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FormatError, match="file has become shorter since it was opened") as caught:
            file[0]
        assert caught.value.file == str(path)
        path.unlink()  # only a name is lost
        samples.write(path, {"0": BLOB})
        assert bytes(file.blob(0)) == BLOB


def test_files_are_read_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to the file afterwards does not matter; giving pages back does not lose them."""
    monkeypatch.setenv("UQFF_MMAP", "0")
    path = samples.write(tmp_path / "a.uqff", {"0": BLOB})
    with uqff.open(path) as file:
        layer = file[0]
        file.release(0)
        assert bytes(file.blob(0)) == BLOB
        path.unlink()
        path.write_bytes(b"")
        assert bytes(file.blob(0)) == BLOB
    assert layer == uqff.deserialize(BLOB)


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_more_shards_than_a_process_may_have_files(tmp_path: Path) -> None:
    """Each is mapped, opened, looked at, given back and mapped again, with fewer descriptors than there are shards."""
    for number in range(400):
        samples.write(tmp_path / f"m-{number}.uqff", {str(number): BLOB})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (360, limits[1]))
    try:
        with uqff.open(tmp_path) as file:
            assert len(os.listdir("/proc/self/fd")) < 300
            layers = [file[number] for number in range(400)]
            for number in range(400):
                file.release(number)
        gc.collect()
        assert all(layer == layers[0] == uqff.deserialize(BLOB) for layer in layers)
        assert sum("m-399.uqff" in line for line in Path("/proc/self/maps").read_text().splitlines()) == 1
        del layers
        gc.collect()
        assert "m-399.uqff" not in Path("/proc/self/maps").read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
