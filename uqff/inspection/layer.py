"""One layer in full: every field with place, bytes and value, and what the weight looks like as numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from uqff.codes import DType
from uqff.container import UqffFile
from uqff.inspection.hexdump import HexLine, hexdump
from uqff.inspection.statistics import Statistics, statistics_of
from uqff.inspection.summary import LayerRow, layer_row, module_names
from uqff.inspection.values import decode_elements
from uqff.schema.bricks import FieldTrace

__all__ = ["PREVIEW", "RAW_BYTES", "FieldRow", "LayerReport", "report_layer"]

RAW_BYTES = 64
"""Most bytes that a field row carries; a payload has more."""
PREVIEW = 4
"""Elements of a tensor's data that are decoded."""


@dataclass(frozen=True)
class FieldRow:
    """One field of a blob, or one entry of a 1.x layer.

    Attributes:
        path: dotted name, as in the spec's offset tables.
        offset: from the start of the file.
        nbytes: its size.
        type: as the spec writes it.
        raw: its first :data:`RAW_BYTES` bytes.
        value: decoded; None for payload.
        preview: the first :data:`PREVIEW` elements, for the data of a tensor record whose dtype is known.
        meaning: one phrase.
        preview_is_partial: whether the tensor has more elements.
    """

    path: str
    offset: int
    nbytes: int
    type: str
    raw: bytes
    value: Any
    preview: list[int | float] | None
    meaning: str
    preview_is_partial: bool = False


@dataclass(frozen=True)
class LayerReport:
    """One layer. ``fields`` are those that could be read; ``statistics`` is None if not asked for or broken."""

    row: LayerRow
    fields: tuple[FieldRow, ...]
    statistics: Statistics | None
    hexdump: tuple[HexLine, ...] | None


def report_layer(
    file: UqffFile, key: str, *, statistics: bool = True, dump: bool = False, limit: int = RAW_BYTES
) -> LayerReport:
    """Look at one layer.

    Args:
        file: an open model.
        key: key of a layer in it.
        statistics: dequantise the weight and measure it.
        dump: make the annotated dump.
        limit: bytes of each field in the dump; 0 for all.
    """
    trace: list[FieldTrace] = []
    row = replace(layer_row(file, key, trace=trace), module=module_names(file).get(key))
    pieces = _blob_pieces(file, key, trace) if file.generation == "0.x" else _entry_pieces(file, key, trace)
    measured = None
    if statistics and row.error is None:
        measured = statistics_of(file[key].weight.numbers().array().view(np.float32))
    lines = None
    if dump and file.generation == "0.x":
        lines = tuple(hexdump(trace, file.blob(key), base=row.offset, limit=limit))
    elif dump:
        lines = tuple(
            line
            for field, data, _ in pieces
            for line in hexdump([field._replace(offset=0)], data, base=field.offset, limit=limit)
        )
    return LayerReport(row, tuple(_field_rows(pieces)), measured, lines)


_Piece = tuple[FieldTrace, memoryview, DType | None]
"""A field placed in its file, its bytes, and what they are if they are elements."""


def _blob_pieces(file: UqffFile, key: str, trace: list[FieldTrace]) -> list[_Piece]:
    blob, base = file.blob(key), file.place(key).offset
    dtypes = {field.path: field.value for field in trace if isinstance(field.value, DType)}
    return [
        (
            field._replace(offset=base + field.offset),
            blob[field.offset : field.offset + field.size],
            dtypes.get(f"{field.path.rpartition('.')[0]}.dtype"),
        )
        for field in trace
    ]


def _entry_pieces(file: UqffFile, key: str, trace: list[FieldTrace]) -> list[_Piece]:
    entries = file.entries(key)
    return [(f, entries[f.path].data, DType.of_safetensors(entries[f.path].dtype)) for f in trace]


def _field_rows(pieces: list[_Piece]) -> list[FieldRow]:
    rows = []
    for field, data, dtype in pieces:
        preview = value = None
        partial = False
        if isinstance(field.value, memoryview):
            preview = None if dtype is None else decode_elements(data, dtype, PREVIEW)
            partial = dtype is not None and len(data) > PREVIEW * dtype.itemsize
        else:
            value = field.value
        rows.append(
            FieldRow(
                field.path,
                field.offset,
                field.size,
                field.type,
                bytes(data[:RAW_BYTES]),
                value,
                preview,
                field.meaning,
                partial,
            )
        )
    return rows
