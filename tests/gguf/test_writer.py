"""The GGUF writer: byte for byte what the gguf package writes, and nothing left behind by a failure."""

from __future__ import annotations

from pathlib import Path

import gguf as package
import numpy as np
import pytest

from tests.support.samples_gguf import F32, Q8_0, array, gguf, pair
from uqff.errors import FormatError
from uqff.gguf.schema import Array, Value, ValueType
from uqff.gguf.writer import PlannedTensor, write_gguf
from uqff.limits import MAX_GGUF_NAME
from uqff.progress import Step

PAIRS = [
    ("general.architecture", Value(ValueType.TEXT, "llama")),
    ("n", Value(ValueType.U32, 7)),
    ("f", Value(ValueType.F32, 1e-5)),
    ("b", Value(ValueType.BOOL, True)),
    ("t", Value(ValueType.ARRAY, Array.of(ValueType.TEXT, ["a", "größe"]))),
    ("i", Value(ValueType.ARRAY, Array.of(ValueType.I32, [1, -2]))),
]
TENSORS = [
    PlannedTensor("q", (2, 32), 8, 68, lambda: [Q8_0.data[:10], Q8_0.data[10:]]),
    PlannedTensor("f", (3,), 0, 12, lambda: [F32.data]),
]


def test_bytes_by_hand(tmp_path: Path) -> None:
    """Every field, the padding before the data and between tensors; the last one is padded too, as by llama.cpp."""
    path, steps = tmp_path / "m.gguf", list[Step]()
    size = write_gguf(path, PAIRS, TENSORS, steps.append)
    pairs = [
        pair("general.architecture", "text", "llama"),
        pair("n", "u32", 7),
        pair("f", "f32", 1e-5),
        pair("b", "bool", True),
        array("t", "text", ["a", "größe"]),
        array("i", "i32", [1, -2]),
    ]
    assert path.read_bytes() == gguf(pairs, [Q8_0, F32]) + bytes(20)
    assert size == path.stat().st_size
    assert steps == [Step("convert", "q", 1, 2, 64, 67, "weights"), Step("convert", "f", 2, 2, 67, 67, "weights")]


def test_bytes_of_the_gguf_package(tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("n", 7)
    writer.add_float32("f", 1e-5)
    writer.add_bool("b", True)
    writer.add_array("t", ["a", "größe"])
    writer.add_array("i", [1, -2])
    quantised = np.frombuffer(Q8_0.data, np.uint8).reshape(2, 34)
    writer.add_tensor("q", quantised, raw_dtype=package.GGMLQuantizationType.Q8_0)
    writer.add_tensor("f", np.frombuffer(F32.data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_gguf(tmp_path / "ours.gguf", PAIRS, TENSORS)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("data", [b"", bytes(11), bytes(13)])
def test_a_payload_of_another_size(tmp_path: Path, data: bytes) -> None:
    """The old file stays, and nothing lies beside it."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    with pytest.raises(FormatError, match=f"expected 12 bytes, got {len(data)}"):
        write_gguf(path, [], [PlannedTensor("f", (3,), 0, 12, lambda: [data])])
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])


def test_what_does_not_fit_its_field(tmp_path: Path) -> None:
    """A number too large for its type, a name longer than any reader takes; the longest one passes."""
    for number in (-1, 2**32):
        with pytest.raises(FormatError, match="does not fit its type: expected u32"):
            write_gguf(tmp_path / "m.gguf", [("n", Value(ValueType.U32, number))], [])
    name = "n" * MAX_GGUF_NAME
    with pytest.raises(FormatError, match="count out of range"):
        write_gguf(tmp_path / "m.gguf", [(name + "n", Value(ValueType.U8, 1))], [])
    write_gguf(tmp_path / "m.gguf", [(name, Value(ValueType.U8, 1))], [])
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]
