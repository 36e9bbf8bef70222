"""The framing of GGUF files: header, metadata and list of tensors, declared once for reader and writer.

::

    file     magic "GGUF" | version u32 | tensor_count u64 | pair_count u64 | pair ... | tensor ... | padding | data
    text     length u64 | bytes
    pair     key text | type u32 | value
    array    type u32 | count u64 | value ...
    tensor   name text | ndim u32 | dims u64 x ndim, innermost first | ggml_type u32 | offset u64, from the data's start

The data begins at the next multiple of ``general.alignment`` (32 if there is none), and so does every tensor in it.
Everything is little endian here; big-endian files are recognised and refused.

Authority: ggml, ``docs/gguf.md`` and ``src/gguf.cpp`` (``gguf_init_from_file``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from construct import Int64ul

from uqff.errors import FormatError, UnsupportedError, located
from uqff.limits import MAX_GGUF_ARRAY, MAX_GGUF_NAME, MAX_GGUF_PAIRS, MAX_GGUF_RANK, MAX_GGUF_TENSORS
from uqff.schema.bricks import U32, Checked, Cursor, Dims, Sink, Span, Violation
from uqff.schema.layout import Layout

__all__ = [
    "ALIGNMENT_KEY",
    "ARRAY",
    "DEFAULT_ALIGNMENT",
    "HEAD",
    "PAIR",
    "TENSOR",
    "TEXT",
    "VERSION",
    "Array",
    "TensorInfo",
    "Value",
    "ValueType",
    "aligned",
    "build_head",
    "checked_alignment",
    "read_head",
    "read_pair",
    "read_tensor",
]

MAGIC: Final = int.from_bytes(b"GGUF", "little")
VERSION: Final = 3
"""What is written. Version 2 has the same layout; version 1 had counts of 32 bits."""
READABLE: Final = (2, 3)

ALIGNMENT_KEY: Final = "general.alignment"
DEFAULT_ALIGNMENT: Final = 32
MAX_ALIGNMENT: Final = 1 << 20
"""Largest alignment taken: a huge page is 2 MiB, and nobody uses more than 4096."""

U64 = Int64ul


class ValueType(Enum):
    """The types of metadata values: (number, struct code)."""

    U8 = (0, "B")
    I8 = (1, "b")
    U16 = (2, "H")
    I16 = (3, "h")
    U32 = (4, "I")
    I32 = (5, "i")
    F32 = (6, "f")
    BOOL = (7, "?")
    TEXT = (8, "")
    ARRAY = (9, "")
    U64 = (10, "Q")
    I64 = (11, "q")
    F64 = (12, "d")

    def __init__(self, number: int, code: str) -> None:
        self.number = number
        self.struct = struct.Struct("<" + code)


_BY_NUMBER = {value_type.number: value_type for value_type in ValueType}


def _decode_value_type(number: int) -> ValueType:
    if number not in _BY_NUMBER:
        raise Violation("unknown type of value", expected=f"0 to {max(_BY_NUMBER)}", got=number)
    return _BY_NUMBER[number]


def _decode_version(number: int) -> int:
    if number in READABLE:
        return number
    problem = "big-endian GGUF file" if int.from_bytes(number.to_bytes(4, "little"), "big") in READABLE else None
    raise Violation(
        problem or "unknown version of GGUF",
        expected=" or ".join(map(str, READABLE)),
        got=number,
        error=UnsupportedError,
    )


def _decode_magic(number: int) -> int:
    if number != MAGIC:
        raise Violation("not a GGUF file", expected=repr(b"GGUF"), got=repr(number.to_bytes(4, "little")))
    return number


def _at_most(most: int) -> Any:
    def decode(number: int) -> int:
        if number > most:
            raise Violation("count out of range", expected=f"at most {most}", got=number)
        return number

    return decode


class InnermostFirst(Dims):
    """A shape as u64, stored innermost first, given outermost first; none of them 0."""

    itemsize = 8

    def _parse(self, stream: Cursor, context: Any, path: str) -> tuple[int, ...]:
        ndim = context[self.count]
        dims: tuple[int, ...] = struct.unpack(f"<{ndim}Q", stream.read(8 * ndim))
        if 0 in dims:
            raise Violation("empty dimension", expected="every dimension at least 1", got=list(dims))
        return dims[::-1]

    def _build(self, obj: Any, stream: Sink, context: Any, path: str) -> Any:
        stream.write(struct.pack(f"<{len(obj)}Q", *obj[::-1]))
        return obj


HEAD = Layout(
    "magic" / Checked(U32, _decode_magic, int) * "`GGUF`",
    "version" / Checked(U32, _decode_version, int) * "2 or 3",
    "tensor_count" / Checked(U64, _at_most(MAX_GGUF_TENSORS), int) * "number of tensors",
    "pair_count" / Checked(U64, _at_most(MAX_GGUF_PAIRS), int) * "number of metadata pairs",
)
TEXT = Layout(
    "length" / U64 * "bytes of `data`",
    "data" / Span(lambda text: int(text["length"]), "length") * "UTF-8, without a terminator",
    label="text",
)
NAME = Layout(
    "length" / Checked(U64, _at_most(MAX_GGUF_NAME), int) * "bytes of `data`",
    "data" / Span(lambda text: int(text["length"]), "length") * "UTF-8, without a terminator",
    label="text",
)
PAIR = Layout(
    "key" / NAME * "name of the value",
    "type" / Checked(U32, _decode_value_type, lambda t: t.number) * "type of the value",
)
ARRAY = Layout(
    "type" / Checked(U32, _decode_value_type, lambda t: t.number) * "type of the elements",
    "count" / Checked(U64, _at_most(MAX_GGUF_ARRAY), int) * "number of elements",
)
TENSOR = Layout(
    "name" / NAME * "name of the tensor",
    "ndim" / Checked(U32, _at_most(MAX_GGUF_RANK), int) * "number of dimensions",
    "shape" / InnermostFirst() * "dimensions in elements, stored innermost first",
    "type" / U32 * "ggml type",
    "offset" / U64 * "where its bytes begin, from the start of the data",
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the list: ``shape`` is outermost first, ``offset`` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Array:
    """An array of metadata: as long as its bytes, made into Python values only when they are asked for."""

    type: ValueType
    count: int
    data: memoryview

    def values(self, most: int | None = None) -> list[Any]:
        """All elements, or the first ones.

        Raises:
            FormatError: a text is not UTF-8.
        """
        count = self.count if most is None else min(most, self.count)
        if self.type is not ValueType.TEXT:
            unpacking = self.type.struct
            return [value for (value,) in unpacking.iter_unpack(self.data[: count * unpacking.size])]
        texts, at, length = [], 0, ValueType.U64.struct
        for _ in range(count):
            (size,) = length.unpack_from(self.data, at)
            texts.append(_decoded(self.data[at + 8 : at + 8 + size]))
            at += 8 + size
        return texts

    @classmethod
    def of(cls, type: ValueType, values: Sequence[Any]) -> Array:
        """An array of Python values."""
        if type is ValueType.TEXT:
            raws = [value.encode("utf-8") for value in values]
            data = b"".join(part for raw in raws for part in (len(raw).to_bytes(8, "little"), raw))
        else:
            data = b"".join(map(type.struct.pack, values))
        return cls(type, len(values), memoryview(data))


@dataclass(frozen=True)
class Value:
    """A metadata value and its type; of an array, :class:`Array`."""

    type: ValueType
    value: Any


def aligned(offset: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-offset // alignment) * alignment


def checked_alignment(value: Value | None) -> int:
    """The alignment that a file asks for.

    Raises:
        FormatError: not a power of two from 8 to 2**20.
    """
    if value is None:
        return DEFAULT_ALIGNMENT
    number = value.value
    if value.type is not ValueType.U32 or not 8 <= number <= MAX_ALIGNMENT or number & (number - 1):
        expected = f"u32, a power of two from 8 to {MAX_ALIGNMENT}"
        raise FormatError("alignment out of range", field=ALIGNMENT_KEY, expected=expected, got=number)
    return int(number)


def read_head(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of metadata pairs."""
    fields = HEAD._parse(cursor, None, "")
    return fields["version"], fields["tensor_count"], fields["pair_count"]


def read_pair(cursor: Cursor) -> tuple[str, Value]:
    """A metadata pair.

    Raises:
        FormatError: it runs past the end or has an unknown type.
        UnsupportedError: an array of arrays.
    """
    start = cursor.tell()
    fields = PAIR._parse(cursor, None, "")
    key = _decoded(fields["key"]["data"], "key", start)
    start, type = cursor.tell(), fields["type"]
    try:
        with located(prefix=key):
            if type is ValueType.ARRAY:
                return key, Value(type, _read_array(cursor))
            if type is not ValueType.TEXT:
                return key, Value(type, _read_number(cursor, type))
            text = TEXT._parse(cursor, None, "")["data"]
    except Violation as broken:
        error = broken.as_error(key)
        error.offset = start
        raise error from None
    return key, Value(type, _decoded(text, key, start))


def _read_number(cursor: Cursor, type: ValueType) -> Any:
    raw = cursor.read(type.struct.size)
    if type is ValueType.BOOL and raw[0] > 1:
        raise Violation("not a truth value", expected="0 or 1", got=raw[0])
    return type.struct.unpack(raw)[0]


def _read_array(cursor: Cursor) -> Array:
    fields = ARRAY._parse(cursor, None, "")
    type, count = fields["type"], fields["count"]
    if type is ValueType.ARRAY:
        raise Violation("array of arrays", error=UnsupportedError)
    if type is not ValueType.TEXT:
        data = cursor.read(count * type.struct.size)
        if type is ValueType.BOOL and bytes(data).strip(b"\0\1"):
            raise Violation("not a truth value", expected="0 or 1")
        return Array(type, count, data)
    return Array(type, count, _read_texts(cursor, count))


def _read_texts(cursor: Cursor, count: int) -> memoryview:
    """The bytes of an array of texts: walked through, none is kept."""
    start = cursor.tell()
    rest = cursor.read(cursor.remaining)
    at, end, length = 0, len(rest), ValueType.U64.struct
    for index in range(count):
        size = length.unpack_from(rest, at)[0] if at + 8 <= end else end
        at += 8 + size
        if at > end:
            cursor.seek(start)
            raise Violation("truncated", expected=f"{count} texts", got=f"the end within number {index}")
    cursor.seek(start)
    return cursor.read(at)


def read_tensor(cursor: Cursor) -> TensorInfo:
    """An item of the list of tensors.

    Raises:
        FormatError: it runs past the end, or breaks a rule of its own.
    """
    start = cursor.tell()
    fields = TENSOR._parse(cursor, None, "")
    return TensorInfo(
        _decoded(fields["name"]["data"], "name", start), fields["shape"], fields["type"], fields["offset"]
    )


def _decoded(data: memoryview, field: str | None = None, offset: int | None = None) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as exc:
        raise FormatError("text is not UTF-8", field=field, offset=offset, got=exc.reason) from exc


def build_head(pairs: Sequence[tuple[str, Value]], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the data, its padding excluded.

    Raises:
        FormatError: a name is too long, or a number does not fit its type.
    """
    sink = Sink()
    head = {"magic": MAGIC, "version": VERSION, "tensor_count": len(tensors), "pair_count": len(pairs)}
    HEAD._build(head, sink, None, "")
    for key, value in pairs:
        PAIR._build({"key": _text(key), "type": value.type}, sink, None, "")
        _build_value(value, sink, key)
    for tensor in tensors:
        fields = {
            "name": _text(tensor.name),
            "ndim": len(tensor.shape),
            "shape": tensor.shape,
            "type": tensor.type,
            "offset": tensor.offset,
        }
        TENSOR._build(fields, sink, None, "")
    return b"".join(sink.chunks)


def _build_value(value: Value, sink: Sink, key: str) -> None:
    if value.type is ValueType.ARRAY:
        array: Array = value.value
        ARRAY._build({"type": array.type, "count": array.count}, sink, None, "")
        sink.append(array.data, array.data.nbytes)
        return
    if value.type is ValueType.TEXT:
        TEXT._build(_text(value.value), sink, None, "")
        return
    try:
        sink.write(value.type.struct.pack(value.value))
    except (struct.error, OverflowError) as exc:
        raise FormatError(
            "does not fit its type", field=key, expected=value.type.name.lower(), got=value.value
        ) from exc


def _text(text: str) -> dict[str, Any]:
    data = memoryview(text.encode("utf-8"))
    return {"length": data.nbytes, "data": data}
