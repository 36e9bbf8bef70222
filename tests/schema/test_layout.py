"""The bricks and the layout: parsing, building, sizes, places, tables."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from tests.support.samples import u32
from uqff import FormatError
from uqff.limits import MAX_RANK, U32_MAX
from uqff.schema.bricks import U8, U32, Checked, Derived, Dims, Placeholder, Scalar, Span, Vector
from uqff.schema.layout import Extension, Layout, Row

INNER = Layout(
    "count" / Derived(U8, lambda s: s["data"].nbytes) * "n",
    "data" / Span(lambda s: s["count"], "count") * "d",
    label="I",
)
OUTER = Layout(
    "kind" / Checked.choice(U8, 1, 2) * "one or two",
    "flag" / Derived(Checked.choice(U8, 0, 1), lambda s: s.get("more") is not None) * "whether more follows",
    "scale" / Scalar("f", "f32") * "a number",
    "sums" / Vector(3, "h", "i16") * "three numbers",
    "ndim" / Derived(U32, lambda s: len(s["shape"])) * "dimensions",
    "shape" / Dims("ndim") * "the dimensions",
    "more" / Extension("flag", INNER) * "more bytes",
)
SCALE, SUMS = struct.pack("<f", 1.5), struct.pack("<3h", 1, -2, 3)
BYTES = b"\2\1" + SCALE + SUMS + u32(2, 7, 9) + b"\3abc"


def test_parse() -> None:
    """Integers as numbers, floats and payloads as views of the buffer."""
    fields = OUTER.read(BYTES)
    assert (fields["kind"], fields["flag"], fields["ndim"], fields["shape"]) == (2, 1, 2, (7, 9))
    assert bytes(fields["scale"]) == SCALE
    assert bytes(fields["more"]["data"]) == b"abc"
    assert fields["more"]["data"].obj is BYTES


def test_build() -> None:
    """Derived fields are computed, whatever is given for them."""
    fields: dict[str, Any] = {
        "kind": 2,
        "flag": 0,
        "scale": memoryview(SCALE),
        "sums": memoryview(SUMS),
        "ndim": 99,
        "shape": (7, 9),
        "more": {"data": memoryview(b"abc")},
    }
    assert b"".join(map(bytes, OUTER.chunks(fields))) == BYTES
    assert OUTER.nbytes(fields) == len(BYTES)
    fields["more"] = {"data": Placeholder(3)}
    assert OUTER.nbytes(fields) == len(BYTES)
    fields["more"] = None
    assert b"".join(map(bytes, OUTER.chunks(fields))) == b"\2\0" + BYTES[2:-4]


def test_trace_places_every_byte() -> None:
    """Nested fields have dotted paths; numbers are shown decoded."""
    places: list[Any] = []
    OUTER.read(BYTES, trace=places)
    assert [(p.path, p.offset, p.size, p.type) for p in places] == [
        ("kind", 0, 1, "u8"),
        ("flag", 1, 1, "u8"),
        ("scale", 2, 4, "f32"),
        ("sums", 6, 6, "i16 × 3"),
        ("ndim", 12, 4, "u32"),
        ("shape", 16, 8, "u32 × ndim"),
        ("more.count", 24, 1, "u8"),
        ("more.data", 25, 3, "bytes"),
    ]
    assert [p.value for p in places[:5]] == [2, 1, 1.5, [1, -2, 3], 2]


@pytest.mark.parametrize("end", range(len(BYTES)))
def test_truncation_names_the_field_that_is_cut(end: int) -> None:
    """With and without a trace alike."""
    messages = set()
    traces: tuple[list[Any] | None, ...] = (None, [])
    for trace in traces:
        with pytest.raises(FormatError, match="truncated") as caught:
            OUTER.read(BYTES[:end], trace=trace)
        messages.add((caught.value.field, caught.value.offset, str(caught.value)))
    ((field, offset, _),) = messages
    places: list[Any] = []
    OUTER.read(BYTES, trace=places)
    assert (field, offset) == next((p.path, p.offset) for p in places if p.offset <= end < p.offset + p.size)


@pytest.mark.parametrize(
    ("data", "problem", "field", "offset"),
    [
        (b"\0" + BYTES[1:], "value out of range", "kind", 0),
        (b"\3" + BYTES[1:], "value out of range", "kind", 0),
        (BYTES[:1] + b"\2" + BYTES[2:], "value out of range", "flag", 1),
        (BYTES[:12] + u32(MAX_RANK + 1) + BYTES[16:], "too many dimensions", "ndim", 12),
        (BYTES[:12] + u32(U32_MAX) + BYTES[16:], "too many dimensions", "ndim", 12),
        (BYTES[:16] + u32(0, 9) + BYTES[24:], "empty dimension", "shape", 16),
        (BYTES[:24] + b"\4abc", "truncated", "more.data", 25),
        (BYTES[:24] + b"\2abc", "trailing bytes", None, 27),
    ],
)
def test_broken_bytes(data: bytes, problem: str, field: str | None, offset: int) -> None:
    """The rule, the field that breaks it and where that field lies, even if a later one noticed."""
    traces: tuple[list[Any] | None, ...] = (None, [])
    for trace in traces:
        with pytest.raises(FormatError) as caught:
            OUTER.read(data, trace=trace)
        assert (caught.value.problem, caught.value.field, caught.value.offset) == (problem, field, offset)
    if problem == "trailing bytes":
        assert OUTER.read(data, exact=False)["kind"] == 2


GOOD = {"kind": 1, "scale": memoryview(SCALE), "sums": memoryview(SUMS), "shape": (1,), "more": None}


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"kind": 3}, "kind"),
        ({"kind": 256}, "kind"),
        ({"scale": memoryview(b"123")}, "scale"),
        ({"sums": memoryview(SCALE)}, "sums"),
        ({"shape": (0,)}, "shape"),
        ({"shape": (2**32,)}, "shape"),
        ({"shape": (-1,)}, "shape"),
        ({"shape": (1,) * (MAX_RANK + 1)}, "shape"),
        ({"more": {"data": memoryview(bytes(256))}}, "more.count"),
    ],
)
def test_broken_values_are_not_built(changed: dict[str, Any], field: str) -> None:
    """The same rules in the other direction, for sizes and for bytes."""
    assert OUTER.nbytes(GOOD) == 20
    for build in (OUTER.chunks, OUTER.nbytes):
        with pytest.raises(FormatError) as caught:
            build({**GOOD, **changed})
        assert caught.value.field == field


def test_number_beyond_its_field_is_a_format_error() -> None:
    """Not an error of the library beneath."""
    layout = Layout("n" / U32 * "a number")
    assert layout.chunks({"n": U32_MAX}) == [b"\xff\xff\xff\xff"]
    for number in (-1, 2**32):
        with pytest.raises(FormatError, match="does not fit its field") as caught:
            layout.chunks({"n": number})
        assert caught.value.field == "n"


def test_declared_length_is_compared_modulo_2_32() -> None:
    """A stated length may have wrapped; the computed size counts."""
    layout = Layout(
        "length" / Derived(U32, lambda s: s["size"]) * "stated",
        "size" / U32 * "true size in units of 2**31 bytes",
        "data" / Span(lambda s: s["size"] << 31, "size", declared="length") * "payload",
    )
    with pytest.raises(FormatError, match="truncated") as caught:
        layout.read(u32(0, 2))
    assert caught.value.expected == f"{2**32} bytes"
    with pytest.raises(FormatError, match="length does not fit") as caught:
        layout.read(u32(1, 2))
    assert (caught.value.field, caught.value.offset) == ("length", 0)
    assert bytes(layout.read(u32(0, 0))["data"]) == b""


def test_sizes() -> None:
    """Fixed sizes add up; variable ones are said so."""
    assert Layout("a" / U8 * "x", "b" / U32 * "y", "c" / Vector(3, "h", "i16") * "z").fixed_size == 1 + 4 + 2 * 3
    with pytest.raises(TypeError):
        _ = OUTER.fixed_size


def test_every_field_has_a_name_and_a_meaning() -> None:
    """The tables of the spec are printed from them."""
    for wrong in (U8, "a" / U8, U8 * "meaning"):
        with pytest.raises(TypeError):
            Layout(wrong)


def test_offset_table() -> None:
    """Fields after one of variable size are placed relative to it."""
    rows = OUTER.rows()
    assert all(isinstance(row, Row) for row in rows)
    assert [(row.offset, row.size, row.field, row.type) for row in rows] == [
        ("0", "1", "kind", "u8"),
        ("1", "1", "flag", "u8"),
        ("2", "4", "scale", "f32"),
        ("6", "6", "sums", "i16 × 3"),
        ("12", "4", "ndim", "u32"),
        ("16", "4·ndim", "shape", "u32 × ndim"),
        ("16 + 4·ndim", "I or 0", "more", "[I]"),
    ]


def test_scalars_keep_every_bit() -> None:
    """A signalling NaN would not survive a Python float."""
    layout = Layout("x" / Scalar("f", "f32") * "number")
    for bits in ("0100807f", "ffffffff", "00000080"):
        fields = layout.read(bytes.fromhex(bits))
        assert bytes(layout.chunks(fields)[0]) == bytes.fromhex(bits)
