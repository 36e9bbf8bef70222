"""The GGUF reader: values by hand, the gguf package as an oracle, each rule with its error, hostile bytes, splits."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.samples_gguf import ALL_KINDS, F32, Q8_0, SOUND, Tensor, array, gguf, pair, text
from uqff.checkpoints import open_gguf
from uqff.errors import FormatError, ShardError, UnsupportedError, UqffError
from uqff.families.gguf.blocks import BLOCK_TYPES
from uqff.gguf.schema import Array, ValueType
from uqff.limits import MAX_GGUF_ARRAY, MAX_GGUF_PAIRS, MAX_GGUF_RANK, MAX_GGUF_TENSORS

CONSTANT = 256 * 1024
"""Bytes that opening a hostile file may allocate."""


def write(folder: Path, data: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def plain(value: Any) -> Any:
    return value.values() if isinstance(value, Array) else value


def test_values_of_every_type(tmp_path: Path) -> None:
    """Numbers at the ends of their ranges, texts, arrays; in the file's order."""
    with open_gguf(write(tmp_path, SOUND)) as file:
        found = {key: (value.type.name.lower(), plain(value.value)) for key, value in file.pairs.items()}
    assert found == {
        "u8": ("u8", 255),
        "i8": ("i8", -128),
        "u16": ("u16", 65535),
        "i16": ("i16", -32768),
        "u32": ("u32", 2**32 - 1),
        "i32": ("i32", -(2**31)),
        "f32": ("f32", struct.unpack("<f", struct.pack("<f", 1e-5))[0]),
        "true": ("bool", True),
        "text": ("text", "größe"),
        "u64": ("u64", 2**64 - 1),
        "i64": ("i64", -(2**63)),
        "f64": ("f64", 0.1),
        "texts": ("array", ["a", "", "bc"]),
        "numbers": ("array", [1, -2]),
        "none": ("array", []),
    }
    assert list(found) == [key for key in found if key in file.pairs]


def test_tensors_are_views_with_the_outermost_dimension_first(tmp_path: Path) -> None:
    """A write through the view would be seen by the next one: nothing is copied."""
    with open_gguf(write(tmp_path, SOUND)) as file:
        assert list(file) == ["q", "f"]
        assert (file["q"].shape, file["q"].type_name, file["q"].nbytes) == ((2, 32), "Q8_0", 68)
        record = file["q"].record()
        assert (record.kind, record.shape, bytes(record.data.numpy())) == ("q8_0", (2, 32), bytes(range(68)))
        assert record.data.data_ptr() == file["q"].record().data.data_ptr()
        file["q"].release()
        assert torch.equal(file["f"].record().dequantize(), torch.tensor([1, -2, 0.5]))
    assert bytes(record.data.numpy()) == bytes(range(68))  # stays valid


def test_version_2_has_the_same_layout(tmp_path: Path) -> None:
    with open_gguf(write(tmp_path, gguf(ALL_KINDS, [Q8_0], version=2))) as file:
        assert (file.version, len(file), len(file.pairs)) == (2, 1, len(ALL_KINDS))


def test_another_alignment(tmp_path: Path) -> None:
    pairs = [pair("general.alignment", "u32", 8)]
    with open_gguf(write(tmp_path, gguf(pairs, [F32, Q8_0], alignment=8))) as file:
        assert bytes(file["q"].record().data.numpy()) == bytes(range(68))


@pytest.mark.parametrize("block_type", [t for t in BLOCK_TYPES if t.name != "Q8_1"], ids=lambda t: t.name)
def test_every_type_that_the_gguf_package_writes(tmp_path: Path, block_type: Any) -> None:
    """Shape, type and bytes are those that its own reader finds; it is wrong about Q8_1 (40 bytes a block, not 36)."""
    kind = package.GGMLQuantizationType(block_type.code)
    data = np.random.default_rng(1).integers(0, 256, (3, 2 * block_type.type_size), np.uint8)
    path = tmp_path / "model.gguf"
    writer = package.GGUFWriter(path, "llama")
    writer.add_array("names", ["x", "yz"])
    writer.add_tensor("t", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = package.GGUFReader(path)
    with open_gguf(path) as file:
        (tensor,) = theirs.tensors
        ours = file["t"]
        assert list(ours.shape) == [int(dim) for dim in tensor.shape[::-1]]
        assert (ours.type_code, ours.begin, ours.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert bytes(ours.record().data.numpy()) == data.tobytes()
        ignored = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
        assert {key: plain(value.value) for key, value in file.pairs.items()} == {
            key: field.contents() for key, field in theirs.fields.items() if key not in ignored
        }


def test_types_that_uqff_does_not_have(tmp_path: Path) -> None:
    """Those of gguf-py have blocks and numbers, but no record of UQFF; of others the size is nobody's business."""
    data = gguf([], [Tensor("i", (256,), 16, bytes(66)), Tensor("new", (7,), 99, b"")])
    with open_gguf(write(tmp_path, data)) as file:
        assert [(tensor.type_name, tensor.nbytes) for tensor in file.values()] == [("IQ2_XXS", 66), ("ggml type 99", 0)]
        assert bytes(file["i"].blocks().payload) == bytes(66)
        assert not file["i"].float32().any()
        with pytest.raises(UnsupportedError, match="IQ2_XXS") as caught:
            file["i"].record()
        assert caught.value.field == "i"
        with pytest.raises(UnsupportedError, match=r"type that is not read.*ggml type 99"):
            file["new"].float32()


@pytest.mark.parametrize(
    ("dims", "size", "problem"),
    [((255,), 66, "row is not whole blocks"), ((256, 2), 131, "tensor runs past the end of the file")],
)
def test_sizes_of_types_that_uqff_does_not_have(tmp_path: Path, dims: tuple[int, ...], size: int, problem: str) -> None:
    """They are those of their blocks."""
    with pytest.raises(FormatError, match=problem):
        open_gguf(write(tmp_path, gguf([], [Tensor("i", dims, 16, bytes(size))])))
    with open_gguf(write(tmp_path, gguf([], [Tensor("i", (256, 2), 16, bytes(132))]))) as file:
        assert file["i"].nbytes == 132


def test_a_value_of_another_type(tmp_path: Path) -> None:
    with open_gguf(write(tmp_path, SOUND)) as file:
        assert file.get_value("u8", ValueType.U8, ValueType.U32) == 255
        assert file.get_value("absent", ValueType.U8) is None
        with pytest.raises(FormatError, match="expected text, got u8") as caught:
            file.get_value("u8", ValueType.TEXT)
        assert caught.value.field == "u8"


HEAD = 24
"""Where the pairs begin."""

BROKEN = {
    "magic": (gguf(magic=b"GGUX"), FormatError, "not a GGUF file", "magic", 0),
    "empty": (b"", FormatError, "truncated", "magic", 0),
    "version-1": (gguf(version=1), UnsupportedError, "unknown version of GGUF", "version", 4),
    "version-4": (gguf(version=4), UnsupportedError, "unknown version of GGUF", "version", 4),
    "big-endian": (gguf(version=3 << 24), UnsupportedError, "big-endian GGUF file", "version", 4),
    "tensors": (gguf(counts=(MAX_GGUF_TENSORS + 1, 0)), FormatError, "count out of range", "tensor_count", 8),
    "pairs": (gguf(counts=(0, MAX_GGUF_PAIRS + 1)), FormatError, "count out of range", "pair_count", 16),
    "pair-missing": (gguf(counts=(0, 1))[:HEAD], FormatError, "truncated", "key.length", HEAD),
    "key-length": (
        gguf(counts=(0, 1))[:HEAD] + struct.pack("<Q", 2**63),
        FormatError,
        "count out of range",
        "key.length",
        HEAD,
    ),
    "key-twice": (
        gguf([pair("a", "u8", 1), pair("a", "u8", 1)]),
        FormatError,
        "key occurs twice",
        "a",
        HEAD + len(pair("a", "u8", 1)),
    ),
    "key-utf-8": (gguf([text(b"\xff") + struct.pack("<IB", 0, 1)]), FormatError, "text is not UTF-8", "key", HEAD),
    "value-utf-8": (
        gguf([text("k") + struct.pack("<I", 8) + text(b"\xff")]),
        FormatError,
        "text is not UTF-8",
        "k",
        HEAD + 13,
    ),
    "value-type": (gguf([text("k") + struct.pack("<I", 13)]), FormatError, "unknown type of value", "type", HEAD + 9),
    "value-bool": (gguf([text("k") + struct.pack("<IB", 7, 2)]), FormatError, "not a truth value", "k", HEAD + 13),
    "value-length": (
        gguf([text("k") + struct.pack("<IQ", 8, 2**62)]),
        FormatError,
        "truncated",
        "k.data",
        HEAD + 13 + 8,
    ),
    "array-count": (
        gguf([array("k", "u8", [], MAX_GGUF_ARRAY + 1)]),
        FormatError,
        "count out of range",
        "k.count",
        HEAD + 13 + 4,
    ),
    "array-short": (gguf([array("k", "u64", [], 10_000)]), FormatError, "truncated", "k", HEAD + 13),
    "array-texts-short": (gguf([array("k", "text", ["ab"], 1000)]), FormatError, "truncated", "k", HEAD + 13),
    "array-nested": (
        gguf([text("k") + struct.pack("<IIQ", 9, 9, 1)]),
        UnsupportedError,
        "array of arrays",
        "k",
        HEAD + 13,
    ),
    "array-bool": (
        gguf([text("k") + struct.pack("<IIQ", 9, 7, 2) + b"\1\2"]),
        FormatError,
        "not a truth value",
        "k",
        HEAD + 13,
    ),
    "alignment-0": (
        gguf([pair("general.alignment", "u32", 0)]),
        FormatError,
        "alignment out of range",
        "general.alignment",
        HEAD,
    ),
    "alignment-24": (
        gguf([pair("general.alignment", "u32", 24)]),
        FormatError,
        "alignment out of range",
        "general.alignment",
        HEAD,
    ),
    "alignment-text": (
        gguf([pair("general.alignment", "text", "32")]),
        FormatError,
        "alignment out of range",
        "general.alignment",
        HEAD,
    ),
    "rank": (
        gguf([], [Tensor("t", (1,) * (MAX_GGUF_RANK + 1), 0, bytes(4))]),
        FormatError,
        "count out of range",
        "ndim",
        HEAD + 9,
    ),
    "dimension-0": (gguf([], [Tensor("t", (0, 1), 0, b"")]), FormatError, "empty dimension", "shape", HEAD + 13),
    "row-of-a-scalar": (
        gguf([], [Tensor("t", (), 8, bytes(34))]),
        FormatError,
        "row is not whole blocks",
        "t.shape",
        HEAD,
    ),
    "row": (gguf([], [Tensor("t", (31, 2), 8, bytes(68))]), FormatError, "row is not whole blocks", "t.shape", HEAD),
    "tensor-twice": (
        gguf([], [F32, F32]),
        FormatError,
        "tensor occurs twice",
        "f",
        HEAD + len(text("f")) + 4 + 8 + 12,
    ),
    "unaligned": (gguf([], [F32._replace(offset=4)]), FormatError, "tensor is not aligned", "f.offset", HEAD),
    "past-the-end": (
        gguf([], [F32._replace(offset=32)]),
        FormatError,
        "tensor runs past the end of the file",
        "f.offset",
        HEAD,
    ),
    "huge": (
        gguf([], [Tensor("t", (2**62, 2**62, 2**62, 2**62), 0, b"")]),
        FormatError,
        "tensor runs past the end of the file",
        "t.offset",
        HEAD,
    ),
    "foreign-past-the-end": (
        gguf([], [Tensor("t", (256,), 16, b"", 2**63)]),
        FormatError,
        "tensor runs past the end of the file",
        "t.offset",
        HEAD,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named_with_its_place(tmp_path: Path, name: str) -> None:
    data, error, problem, field, offset = BROKEN[name]
    path = write(tmp_path, data)
    with pytest.raises(error) as caught:
        open_gguf(path)
    raised = caught.value
    assert (raised.problem, raised.field, raised.offset, raised.file) == (problem, field, offset, str(path))


def test_overlap(tmp_path: Path) -> None:
    """Two tensors may not share a byte; they may lie in any order and leave gaps."""
    first, second = Tensor("a", (16,), 0, bytes(64)), Tensor("b", (16,), 0, bytes(64))
    with pytest.raises(FormatError, match=r"tensors overlap.*also part of a") as caught:
        open_gguf(write(tmp_path, gguf([], [first, second._replace(offset=32)])))
    assert caught.value.field == "b"
    with open_gguf(write(tmp_path, gguf([], [first._replace(offset=64), second._replace(offset=0)]))) as file:
        assert len(file) == 2


def test_every_truncation_says_where(tmp_path: Path) -> None:
    """No prefix is a file, but for the padding between head and data of a file without tensors."""
    path = tmp_path / "model.gguf"
    for end in range(len(SOUND)):
        path.write_bytes(SOUND[:end])
        with pytest.raises(FormatError) as caught:
            open_gguf(path)
        assert caught.value.field is not None
        assert caught.value.offset is not None


def opens_or_raises(path: Path, data: bytes) -> None:
    """Whatever opens can be read in full; whatever does not says so in our words, and cheaply."""
    path.write_bytes(data)
    message = ""
    tracemalloc.start()
    try:
        with open_gguf(path) as file:
            for value in file.pairs.values():
                plain(value.value)
            for tensor in file.values():
                if tensor.block_type is not None:
                    _ = tensor.record().blocks[:1]
    except UqffError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert message.isprintable()
    assert peak < CONSTANT + 20 * len(data)


@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255))
def test_any_byte_changed(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    data = bytearray(SOUND)
    data[at] = byte
    opens_or_raises(tmp_path_factory.getbasetemp() / "mutated.gguf", bytes(data))


@given(st.lists(st.tuples(st.integers(4, len(SOUND) - 8), st.binary(min_size=8, max_size=8)), min_size=1, max_size=4))
def test_any_words_changed(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(SOUND)
    for at, word in changes:
        data[at : at + 8] = word
    opens_or_raises(tmp_path_factory.getbasetemp() / "mutated.gguf", bytes(data))


@given(st.binary(max_size=200))
def test_any_bytes_behind_the_magic(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    opens_or_raises(tmp_path_factory.getbasetemp() / "random.gguf", head + tail)


def split(folder: Path, parts: list[tuple[list[bytes], list[Tensor]]], total: int | None = None) -> Path:
    """A split set, each file with its own claims."""
    count = len(parts)
    total = sum(len(tensors) for _, tensors in parts) if total is None else total
    for number, (pairs, tensors) in enumerate(parts):
        claims = [
            pair("split.no", "u16", number),
            pair("split.count", "u16", count),
            pair("split.tensors.count", "i32", total),
        ]
        write(folder, gguf([*pairs, *claims], tensors), f"m-{number + 1:05}-of-{count:05}.gguf")
    return folder / f"m-00001-of-{count:05}.gguf"


def test_a_split_set_is_one_file(tmp_path: Path) -> None:
    """From any of its files; the metadata is the first one's."""
    split(tmp_path, [([pair("k", "u8", 1)], [F32]), ([], [Q8_0])])
    for number in (1, 2):
        with open_gguf(tmp_path / f"m-{number:05}-of-00002.gguf") as file:
            assert (list(file), file.get_value("k"), len(file.paths)) == (["f", "q"], 1, 2)
            assert bytes(file["q"].record().data.numpy()) == bytes(range(68))


def test_a_split_set_that_is_none(tmp_path: Path) -> None:
    """A file is missing; a tensor is in two; the counts are another set's."""
    path = split(tmp_path, [([], [F32]), ([], [F32])])
    with pytest.raises(ShardError, match="tensor occurs in two files"):
        open_gguf(path)
    path = split(tmp_path, [([], [F32]), ([], [Q8_0])], total=3)
    with pytest.raises(ShardError, match=r"do not belong together: expected 2, got 3") as caught:
        open_gguf(path)
    assert caught.value.field == "split.tensors.count"
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ShardError, match=r"gap in a split file: expected m-00002-of-00002\.gguf"):
        open_gguf(path)


def test_files_of_a_split_set_in_another_order(tmp_path: Path) -> None:
    """Each says which it is; one that does not, or that has another name, is no file of a set."""
    split(tmp_path, [([], [F32]), ([], [Q8_0])])
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    with pytest.raises(ShardError, match="do not belong together: expected 0, got 1") as caught:
        open_gguf(first)
    assert (caught.value.field, caught.value.file) == ("split.no", str(first))
    first.write_bytes(gguf([], [F32]))
    with pytest.raises(ShardError, match="do not belong together: expected 0, got none"):
        open_gguf(first)
    (tmp_path / "m.gguf").write_bytes(data[0])
    with pytest.raises(ShardError, match="file of a split set without its number") as caught:
        open_gguf(tmp_path / "m.gguf")
    assert (caught.value.field, caught.value.got) == ("split.count", "m.gguf, one of 2")
    (tmp_path / "m.gguf").write_bytes(gguf([pair("split.count", "u16", 1)], [F32]))
    with open_gguf(tmp_path / "m.gguf") as file:
        assert list(file) == ["f"]


def test_the_gguf_packages_own_split(tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "s.gguf", "llama", split_max_tensors=1)
    for name in "abc":
        writer.add_tensor(name, np.full(4, ord(name), np.float32))
    writer.write_header_to_file(tmp_path / "s.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "s-00002-of-00003.gguf") as file:
        assert {name: tensor.record().dequantize()[0].item() for name, tensor in file.items()} == {
            name: float(ord(name)) for name in "abc"
        }


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_gguf(tmp_path / "absent.gguf")
    with open_gguf(write(tmp_path, gguf())) as file:
        assert (len(file), repr(file)) == (0, f"<GgufFile {tmp_path / 'model.gguf'}: 0 tensors>")
