"""What a hostile file may cost: no more memory than its size plus a constant, whatever its numbers claim."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import uqff
from tests.support.samples import BLOBS, entry, f32, framed, header, record, run, u32
from tests.support.samples_v1 import LAYERS, Tensor, dims, layer, number, version, write
from uqff import DType, UqffError
from uqff.codec.blob import chunks, trace
from uqff.codec.entries import from_entries, to_entries
from uqff.codec.entries import read_fields as read_entries
from uqff.container.framing import parse_header
from uqff.families.payload import not_finite
from uqff.schema.entries import RawTensor

CONSTANT = 256 * 1024
"""Bytes that any call may allocate: error objects, small dicts, code loaded on the way."""

HUGE = 2**32 - 1


def peak(call: Callable[[], object]) -> int:
    """Bytes allocated at most, beyond what was there; numpy and bytes count, mapped memory does not."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with contextlib.suppress(UqffError):
            call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


HOSTILE = {
    "gguf-length": header(0) + u32(HUGE) + b"\0" + u32(2, 2, 2**16, 2**16) + run(18),
    "gguf-ndim": header(0) + u32(18) + b"\0" + u32(2, HUGE) + run(18),
    "gguf-shape": header(0) + u32(18) + b"\0" + u32(2, 8, *[HUGE - 31] * 8) + run(18),
    "gguf-shape-wraps-to-length": header(0) + u32(0) + b"\0" + u32(0, 8, *[2**31] * 8),
    "record-length": header(1) + b"\0" + u32(HUGE, 0, 1, HUGE),
    "record-ndim": header(1) + b"\0" + u32(4, 6, HUGE) + run(4),
    "record-ndim-9": header(1) + b"\0" + u32(4, 6, 9, *[1] * 9) + run(4),
    "record-shape": header(1) + b"\0" + u32(0, 7, 8, *[2**31] * 8),
    "record-empty": header(1) + b"\0" + u32(0, 0, 8, *[2**32 - 1] * 7, 0),
    "hqq-shape": BLOBS["hqq"].replace(u32(2, 2, 4), u32(2, HUGE, HUGE)),
    "hqq-group": BLOBS["hqq"].replace(b"\4" + u32(4), b"\4" + u32(HUGE)),
    "fp8-length": header(3) + b"\0" + u32(HUGE, 9, 1, HUGE) + f32(1, 1, 1) + u32(9),
    "afq-length": header(4) + b"\0" + u32(HUGE - 3, 1, 1, 2**30 - 1),
    "f8q8-blocks": header(5) + b"\0" + u32(HUGE, 2, HUGE, 32) + run(33),
    "f8q8-shape": header(5) + b"\0" + u32(1, 8, *[HUGE] * 8) + run(33),
    "mxfp4-length": header(6) + b"\0" + u32(2**31, 0, 2, 2**15, 2**16),
    "bias-length": BLOBS["unquant"][:5] + b"\1" + BLOBS["unquant"][6:] + u32(HUGE, 0, 1, HUGE),
    "bias-ndim": BLOBS["unquant"][:5] + b"\1" + BLOBS["unquant"][6:] + u32(0, 0, HUGE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_claims_are_not_allocated(name: str) -> None:
    """Fields that claim gigabytes, terabytes, 2**256 elements or four billion dimensions."""
    blob = HOSTILE[name]
    with pytest.raises(UqffError):
        uqff.deserialize(blob)
    assert peak(lambda: uqff.deserialize(blob)) < CONSTANT
    assert peak(lambda: trace(blob)) < CONSTANT


def claim(name: str, **changes: Tensor) -> dict[str, RawTensor]:
    """A layer of 1.x with other entries; the names of keyword arguments have ``_`` for ``weight.``."""
    merged = {**LAYERS[name], **{suffix.replace("_", "weight.", 1): part for suffix, part in changes.items()}}
    return {suffix: RawTensor(dtype, shape, memoryview(data)) for suffix, (dtype, shape, data) in merged.items()}


HOSTILE_ENTRIES = {
    "gguf-shape": claim("gguf", _shape=dims(HUGE, HUGE - 31)),
    "gguf-shape-wraps": claim("gguf", _shape=dims(*[2**31] * 7, 2**5)),
    "gguf-dimensions": claim("gguf", _shape=("U32", (2**16,), bytes(2**18))),
    "hqq-shape": claim("hqq", _shape=dims(HUGE, HUGE)),
    "hqq-shape-of-groups": claim("hqq", _shape=dims(HUGE - 3, 4)),
    "hqq-group": claim("hqq", _group_size=number(HUGE)),
    "f8q8-blocks": claim("f8q8", _num_blocks=number(HUGE)),
    "f8q8-shape": claim("f8q8", _shape=dims(*[HUGE] * 8)),
    "afq-empty": claim("afq", weight=("U32", (2**31, 0), b"")),
    "mxfp4-empty": claim("mxfp4", weight=("U8", (2**31, 2**31, 0), b"")),
    "unquant-empty": claim("unquant", weight=("F64", (*[2**31] * 7, 0), b"")),
    "bias-empty": claim("unquant", bias=("F32", (2**31, 0), b"")),
}


@pytest.mark.parametrize("name", HOSTILE_ENTRIES)
def test_claims_of_entries_are_not_allocated(name: str) -> None:
    """Shapes, counts and group sizes that claim terabytes, in entries of some bytes."""
    entries = HOSTILE_ENTRIES[name]
    with pytest.raises(UqffError):
        from_entries(entries)
    assert peak(lambda: from_entries(entries)) < CONSTANT
    assert peak(lambda: read_entries(entries)) < CONSTANT


@pytest.mark.parametrize("shift", range(4))
def test_entries_are_not_copied(shift: int) -> None:
    """Megabytes of codes and scales, aligned or not: neither reading nor writing a layer copies them."""

    def part(count: int) -> memoryview:
        return memoryview(bytearray(shift + count))[shift:]

    entries = claim("afq") | {
        "weight": RawTensor("U32", (2**10, 2**10), part(2**22)),
        "weight.bits": RawTensor("U8", (), memoryview(b"\4")),
        "weight.scales": RawTensor("F32", (2**10, 2**8), part(2**20)),
        "weight.biases": RawTensor("F32", (2**10, 2**8), part(2**20)),
    }
    assert peak(lambda: from_entries(entries)) < CONSTANT
    layer = from_entries(entries)
    assert peak(lambda: (layer.weight.nbytes, repr(layer.weight))) < CONSTANT
    assert peak(lambda: to_entries(layer)) < CONSTANT


def test_opening_entries_costs_their_header(tmp_path: Path) -> None:
    """Megabytes of layers that nobody asks for, and one that is asked for."""
    big = {**LAYERS["unquant"], "weight": ("F32", (2**10, 2**10), bytes(2**22))}
    path = write(tmp_path / "m.uqff", version(), *(layer(key, big) for key in "abcd"))
    assert peak(lambda: uqff.open(path)) < CONSTANT
    with uqff.open(path) as file:
        assert peak(lambda: file["c"]) < CONSTANT


@pytest.mark.parametrize(
    "blob",
    [
        header(0) + u32(2**20) + b"\0" + u32(1, 2, 2**9, 2**10) + bytes(2**20),
        header(1) + b"\0" + record("F32", (2**9, 2**9), bytes(2**20)),
        header(6) + b"\0" + record("U8", (2**10, 2**10), bytes(2**20)) + record("U8", (2**10, 2**6), bytes(2**16)),
    ],
    ids=["gguf", "unquant", "mxfp4"],
)
def test_parsing_and_building_do_not_copy_payloads(blob: bytes) -> None:
    """A megabyte of payload costs some kilobytes to read, and as much to write in chunks, aligned or not."""
    for shift in range(4):
        view = memoryview(bytes(shift) + blob)[shift:]
        assert peak(lambda view=view: uqff.deserialize(view)) < CONSTANT  # type: ignore[misc]
        layer = uqff.deserialize(view)
        assert peak(lambda layer=layer: chunks(layer)) < CONSTANT  # type: ignore[misc]


def test_unaligned_parts_are_not_copied_before_they_are_used() -> None:
    """Scales of a megabyte at odd addresses: none is made into a tensor by reading the record."""
    part = record("F32", (2**10, 2**8), bytes(2**20))
    blob = header(4) + b"\0" + record("U32", (2**10, 2**10), bytes(2**22)) + part + part + bytes([4, 32])
    for shift in range(4):
        view = memoryview(bytes(shift) + blob)[shift:]
        assert peak(lambda view=view: uqff.deserialize(view)) < CONSTANT  # type: ignore[misc]
        weight = uqff.deserialize(view).weight
        assert peak(lambda weight=weight: (weight.nbytes, weight.shape, repr(weight))) < CONSTANT  # type: ignore[misc]


def test_opening_a_file_costs_its_header(tmp_path: Path) -> None:
    """Sixteen megabytes of layers that nobody asks for."""
    blob = header(1) + b"\0" + record("U8", (2**11, 2**11), bytes(2**22))
    fields = {str(n): entry(len(blob), n * len(blob)) for n in range(4)}
    (tmp_path / "m.uqff").write_bytes(framed(fields, blob * 4))
    assert peak(lambda: uqff.open(tmp_path / "m.uqff")) < CONSTANT


JSON_FACTOR = 40
"""Python objects of a JSON text take at most so many times its bytes: ``[],`` is a list of 56 and a pointer."""

HEADERS = {
    "lists": b'{"a":[' + b"[]," * 50_000 + b"[]]}",
    "objects": b'{"a":[' + b"{}," * 50_000 + b"{}]}",
    "numbers": b'{"a":[' + b"1234567," * 30_000 + b"1]}",
    "texts": b'{"a":[' + b'"ab",' * 50_000 + b'""]}',
    "keys": b"{" + b",".join(b'"%d":1' % n for n in range(30_000)) + b"}",
    "metadata": b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(30_000)) + b"}}",
    "entries": b"{"
    + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(5_000))
    + b"}",
    "one key": b'{"' + b"k" * 200_000 + b'":1}',
    "one number": b'{"a":' + b"9" * 200_000 + b"}",
    "one float": b'{"a":0.' + b"9" * 200_000 + b"}",
    "nested": b'{"a":' + b"[" * 200_000,
    "spaces": b"{}" + b" " * 200_000,
    "escapes": b'{"' + b"\\u0041" * 40_000 + b'":1}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_cost_no_more_than_their_size(name: str) -> None:
    """JSON is parsed whole, so its length is bounded; what it becomes is bounded by its length."""
    data = framed(HEADERS[name])
    assert peak(lambda: parse_header(memoryview(data))) < JSON_FACTOR * len(data) + CONSTANT


NAMES = {
    "one": [b"k" * 4_000_000],
    "indices": [b"%d" % n + b"k" * 40_000 for n in range(100)],
    "layers": [b"k" * 40_000 + b"%d.weight" % n for n in range(100)],
}


@pytest.mark.parametrize("version", [{}, {"uqff.version.major": 1, "uqff.version.minor": 2, "uqff.version.patch": 0}])
@pytest.mark.parametrize("names", NAMES)
def test_names_cost_four_times_the_file_at_most(names: str, version: dict[str, int], tmp_path: Path) -> None:
    """They are the header, its text, and the names themselves; the rest, where they are told, is bounded."""
    data = b"".join(value.to_bytes(4, "little") for value in version.values())
    fields: dict[str, object] = {
        name: {"dtype": "U32", "shape": [], "data_offsets": [4 * at, 4 * at + 4]} for at, name in enumerate(version)
    }
    end = len(data)
    for name in NAMES[names]:
        fields[name.decode()] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
    path = tmp_path / "m.uqff"
    path.write_bytes(framed(fields, data))
    for call in (lambda: uqff.open(path), lambda: uqff.verify(path)):
        assert peak(call) < 4 * path.stat().st_size + CONSTANT


def test_header_length_is_refused_before_anything_is_read() -> None:
    """A sparse file of claims: 2**63 bytes of header, and a hundred million."""
    for length in (2**63, 100_000_001, 100_000_000):
        data = length.to_bytes(8, "little") + b"{" + bytes(1000)
        assert peak(lambda data=data: parse_header(memoryview(data))) < CONSTANT  # type: ignore[misc]


def test_long_blob_with_a_late_error_is_not_copied() -> None:
    """The error is in the last byte, behind four megabytes."""
    blob = header(1) + b"\0" + record("U8", (2**11, 2**11), bytes(2**22)) + b"x"
    assert peak(lambda: uqff.deserialize(blob)) < CONSTANT
    wrong = np.frombuffer(blob, np.uint8)[:-2]
    assert peak(lambda: uqff.deserialize(wrong)) < CONSTANT


@pytest.mark.parametrize("dtype", [DType.F8E4M3, DType.F16, DType.F32])
def test_looking_for_nan_takes_no_copy(dtype: DType) -> None:
    """Sixteen million bytes are looked at piece by piece; the first of several pieces' findings is named."""
    data = bytearray(2**24)
    record = {"dtype": dtype, "data": memoryview(data)}
    assert peak(lambda: list(not_finite(record, "data"))) < 8 * 2**20
    assert list(not_finite(record, "data")) == []
    count, piece = 2**24 // dtype.itemsize, 2**20
    places = [at for at in (piece - 1, piece, piece + 5, count - 1) if at < count]
    for at in places:
        data[at * dtype.itemsize : (at + 1) * dtype.itemsize] = b"\xff" * dtype.itemsize
    (problem,) = not_finite(record, "data")
    assert problem.offset == places[0] * dtype.itemsize
    assert problem.got == f"element {places[0]}"
    assert problem.problem == f"{len(places)} elements break a rule"
