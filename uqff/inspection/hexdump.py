"""An annotated dump: the bytes of a blob, broken into lines at field borders, each field named where it begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from uqff.families import family_of
from uqff.inspection.values import value_text
from uqff.schema.bricks import FieldTrace
from uqff.schema.layout import Layout

__all__ = ["PER_LINE", "HexLine", "first_block", "hexdump"]

PER_LINE = 16
"""Bytes on a line."""


class HexLine(NamedTuple):
    """A line of a dump.

    Attributes:
        offset: of its first byte, from the start of the file.
        data: its bytes; empty if bytes are left out here.
        skipped: how many bytes are left out.
        field: path of the field that begins here, else empty.
        value: decoded value of that field, as text; empty for payload.
        meaning: of that field.
    """

    offset: int
    data: bytes
    skipped: int = 0
    field: str = ""
    value: str = ""
    meaning: str = ""

    def __str__(self) -> str:
        """``OFFSET  BYTES  |TEXT|  field = value  (meaning)``, with the offset in hexadecimal."""
        if self.skipped:
            return f"{self.offset:08x}  ... {self.skipped:,} bytes left out"
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in self.data)
        note = self.field + (f" = {self.value}" if self.value else "") + (f"  ({self.meaning})" if self.meaning else "")
        line = f"{self.offset:08x}  {self.data.hex(' '):<{3 * PER_LINE - 1}}  {f'|{text}|':<{PER_LINE + 2}}  {note}"
        return line.rstrip()


def hexdump(trace: Sequence[FieldTrace], blob: memoryview, *, base: int = 0, limit: int = 64) -> Iterator[HexLine]:
    """Dump a blob along its fields.

    Args:
        trace: its fields, in file order; it may end early if the blob is broken.
        blob: its bytes.
        base: offset of the blob in the file.
        limit: bytes shown of each field; 0 for all.
    """
    end = 0
    for field in first_block(trace, blob):
        end = field.offset + field.size
        yield from _lines(blob, base, limit, field)
    if end < len(blob):
        yield from _lines(blob, base, limit, FieldTrace("(not parsed)", end, len(blob) - end, "bytes", None, ""))


def _lines(blob: memoryview, base: int, limit: int, field: FieldTrace) -> Iterator[HexLine]:
    end = field.offset + field.size
    stop = min(end, field.offset + limit) if limit else end
    note = (field.path, value_text(field.value), field.meaning)
    for at in range(field.offset, stop, PER_LINE):
        yield HexLine(base + at, bytes(blob[at : min(at + PER_LINE, stop)]), 0, *note)
        note = ("", "", "")
    if stop < end:
        yield HexLine(base + stop, b"", end - stop)


def first_block(trace: Sequence[FieldTrace], blob: memoryview) -> list[FieldTrace]:
    """The fields with the first block of a blocked payload taken apart: ``data[0].d``, ..., ``data[1:]``."""
    layout = _block_layout(trace)
    fields: list[FieldTrace] = []
    for field in trace:
        if layout is None or field.path != "data":
            fields.append(field)
            continue
        inner: list[FieldTrace] = []
        layout.read(blob[field.offset : field.offset + layout.fixed_size], trace=inner)
        fields += [part._replace(path=f"data[0].{part.path}", offset=field.offset + part.offset) for part in inner]
        rest = field.size - layout.fixed_size
        if rest:
            fields.append(field._replace(path="data[1:]", offset=field.offset + layout.fixed_size, size=rest))
    return fields


def _block_layout(trace: Sequence[FieldTrace]) -> Layout | None:
    fields = {field.path: field.value for field in trace}
    family = fields.get("quant_type")
    return None if family is None else family_of(family).block_layout(fields)
