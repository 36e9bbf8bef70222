"""HQQ's numbers row by row, for kernels that multiply; :mod:`uqff.families.hqq.cpu` dequantises in the order of codes.

The packed matrix M has a number of each plane in a word.  A plane has whole rows of the weight, so the row at the same
place in each plane reads the same words; they are taken one after the other, while the words are in a cache.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uqff.numerics.packing import PLANES
from uqff.simd.compiling import inline
from uqff.simd.decoding import WIDTH, Decoder, Decoding
from uqff.simd.load_store import load_i32, load_u8
from uqff.simd.output import FORMS, Bytes, plain, plain_lanes, put_pair, read_ahead
from uqff.simd.vectors import LANES, i32_to_f32

if TYPE_CHECKING:
    from uqff.families.hqq.tensor import HQQ

__all__ = ["decoding"]


def decoding(weight: HQQ) -> Decoding | None:
    """See :meth:`QuantizedTensor.decoding`; None if rows of the weight do not lie within rows of M and planes."""
    parts, bits, axis, group_size = weight.parts, weight.bits, weight.axis, weight.group_size
    groups, inputs, planes = weight.numel // group_size, weight.shape[-1], PLANES[bits]
    rows, columns = (group_size, groups) if axis == 0 else (groups, group_size)
    height = -(-rows // planes)
    words, scales, zeros = (parts[name].array() for name in ("w_q", "scales", "zeros"))
    kinds = [parts[name].dtype for name in ("scales", "zeros")]
    if not all(kind in FORMS for kind in kinds) or len(words) != height * columns * (4 if bits == 3 else 1):
        return None
    if [len(scales), len(zeros)] != [groups * kind.itemsize for kind in kinds]:
        return None
    # A row of the weight is a part of a row of M, or whole rows of M in one plane.
    if columns % WIDTH or inputs % WIDTH or (columns % inputs if axis == 0 else inputs % columns):
        return None
    if height * columns % inputs:
        return None
    given = (words, scales, zeros, *(FORMS[kind] for kind in kinds), columns, height)
    decoder = (_COLUMNS if axis == 0 else _ROWS)[bits]
    return Decoding(decoder, given, weight.numel // WIDTH, WIDTH, planes, height * columns // inputs)


@inline
def _codes(words: Bytes, at: int, shift: int, bits: int) -> Any:
    """16 codes, as numbers."""
    if bits == 8:
        return i32_to_f32(load_u8(words, at))
    if bits == 3:
        return i32_to_f32(load_i32(words, 4 * at) >> shift & 7)
    return i32_to_f32(load_u8(words, at) >> shift & (1 << bits) - 1)


@inline
def _along_columns(parts, bits, planes, out, form, lo, hi):
    """Axis 0: each column of M has its scale and zero."""
    words, scales, zeros, scale_kind, zero_kind, columns, height = parts
    row, column = lo * WIDTH // columns, lo * WIDTH % columns
    shift = bits * (planes - 1 - row // height)
    behind = (row - row // height * height) * columns + column - lo * WIDTH
    for to in range(lo * WIDTH, hi * WIDTH, WIDTH):
        at = to + behind
        read_ahead(words, at * (4 if bits == 3 else 1))
        zero, scale = plain_lanes(zeros, column, zero_kind), plain_lanes(scales, column, scale_kind)
        x = (_codes(words, at, shift, bits) - zero) * scale
        zero, scale = plain_lanes(zeros, column + LANES, zero_kind), plain_lanes(scales, column + LANES, scale_kind)
        put_pair(out, to, form, x, (_codes(words, at + LANES, shift, bits) - zero) * scale)
        column += WIDTH


@inline
def _along_rows(parts, bits, planes, out, form, lo, hi):
    """Axis 1: each row of M has its scale and zero."""
    words, scales, zeros, scale_kind, zero_kind, columns, height = parts
    row = lo * WIDTH // columns
    plane = row // height
    shift, behind = bits * (planes - 1 - plane), plane * height * columns
    to = lo * WIDTH
    while to < hi * WIDTH:
        row = to // columns
        zero, scale = plain(zeros, row, zero_kind), plain(scales, row, scale_kind)
        end = min((row + 1) * columns, hi * WIDTH)
        while to < end:
            at = to - behind
            read_ahead(words, at * (4 if bits == 3 else 1))
            x = (_codes(words, at, shift, bits) - zero) * scale
            put_pair(out, to, form, x, (_codes(words, at + LANES, shift, bits) - zero) * scale)
            to += WIDTH


def _decoder(axis: int, bits: int) -> Decoder:
    planes, along = PLANES[bits], _along_rows if axis else _along_columns

    def decode(parts, out, form, lo, hi):
        along(parts, bits, planes, out, form, lo, hi)

    decode.__qualname__ = f"_{bits}_axis{axis}"
    return Decoder(decode)


_COLUMNS, _ROWS = ({bits: _decoder(axis, bits) for bits in PLANES} for axis in (0, 1))
