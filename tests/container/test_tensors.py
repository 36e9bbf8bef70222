"""A safetensors file written tensor by tensor: the reference bytes in any order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from uqff.container.tensors import TensorWriter
from uqff.errors import FormatError

TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(5, dtype=np.uint8),
    "c": np.arange(4, dtype=np.float16),
}
NAMES = {"float32": "F32", "uint8": "U8", "float16": "F16"}


def entries() -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, NAMES[array.dtype.name], array.shape) for name, array in TENSORS.items()]


@pytest.mark.parametrize("order", list(itertools.permutations(TENSORS)))
def test_any_order_gives_the_reference_bytes(tmp_path: Path, order: tuple[str, ...]) -> None:
    with TensorWriter(tmp_path / "x", entries()) as file:
        for name in order:
            data = TENSORS[name].tobytes()
            file.write(name, (data[:3], memoryview(data)[3:], b""))
        file.finish()
        assert file.nbytes == (tmp_path / "x").stat().st_size
    assert (tmp_path / "x").read_bytes() == save(TENSORS)


def test_metadata_and_no_tensors(tmp_path: Path) -> None:
    for metadata in (None, {"a": "b"}):
        path = tmp_path / str(metadata is None)
        with TensorWriter(path, [], metadata) as file:
            file.finish()
        assert path.read_bytes() == save({}, metadata)


@pytest.mark.parametrize("size", [0, 4, 6])
def test_a_tensor_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    with (
        TensorWriter(tmp_path / "x", entries()) as file,
        pytest.raises(FormatError, match=f"changed while it was written: expected 5 bytes, got {size}"),
    ):
        file.write("a", [bytes(size)])


def test_a_tensor_that_is_missing_or_written_twice(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "x", entries()) as file:
        file.write("a", [bytes(5)])
        with pytest.raises(KeyError):
            file.write("a", [bytes(5)])
        with pytest.raises(FormatError, match=r"tensor was never written \(file .*, field b\)"):
            file.finish()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_pieces_in_any_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    with TensorWriter(tmp_path / "x", entries()) as file:
        file.write("a", [TENSORS["a"].tobytes()])
        file.write("c", [TENSORS["c"].tobytes()])
        for number in order:
            file.write_piece("b", 8 * number, memoryview(TENSORS["b"].tobytes())[8 * number : 8 * number + 8])
        file.finish()
    assert (tmp_path / "x").read_bytes() == save(TENSORS)


def test_pieces_that_do_not_fit(tmp_path: Path) -> None:
    """One that leads beyond the tensor, and all together longer than it; too few are never written."""
    with TensorWriter(tmp_path / "x", entries()) as file:
        for at, size in ((20, 5), (0, 25), (25, 0)):
            with pytest.raises(FormatError, match=f"expected 24 bytes, got {size} at {at}"):
                file.write_piece("b", at, bytes(size))
        file.write_piece("b", 0, bytes(16))
        with pytest.raises(FormatError, match="expected 24 bytes, got 16 at 8"):
            file.write_piece("b", 8, bytes(16))
        file.write("a", [bytes(5)])
        file.write("c", [bytes(8)])
        with pytest.raises(FormatError, match=r"tensor was never written \(file .*, field b\)"):
            file.finish()


def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        TensorWriter(tmp_path / "x", entries())
    assert (tmp_path / "x").read_bytes() == b"mine"
