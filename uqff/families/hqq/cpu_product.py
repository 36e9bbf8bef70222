"""HQQ's numbers row by row, for kernels that multiply; :mod:`uqff.families.hqq.cpu` dequantises in the order of codes.

The packed matrix M has a number of each plane in a word.  A plane has whole rows of the weight, so the row at the same
place in each plane reads the same words; they are taken one after the other, while the words are in a cache.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.numerics.packing import PLANES
from uqff.simd.chain import Task
from uqff.simd.compiling import inline
from uqff.simd.crew import Shared
from uqff.simd.decoding import GRAIN, WIDTH, Decoder, Decoding, add_part
from uqff.simd.load_store import load_f32, load_i32, load_u8
from uqff.simd.output import FORMS, Bytes, plain, plain_lanes, put_pair, read_ahead, unfold
from uqff.simd.planes import load_pieces, store_as_bytes
from uqff.simd.scratch import scratch
from uqff.simd.vectors import LANES, i32_to_f32, multiply_add, splat, total

if TYPE_CHECKING:
    from uqff.families.hqq.tensor import HQQ

__all__ = ["decoding"]

STRIP = 2048
"""Columns of M whose scales and zeros are read together, for all rows that have them."""
BOTH = 2 * STRIP


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
    alone = None
    if axis == 0 and bits in _BY_COLUMNS and inputs % 64 == 0 and group_size % planes == 0:

        def alone(x, y):
            rows, grain = height * (columns // inputs), max(GRAIN // (inputs * planes), 1)
            return Task(_BY_COLUMNS[bits](), (*given, x[0], y[0]), rows, grain)

    stride = height * columns // inputs
    return Decoding(decoder, given, weight.numel // WIDTH, WIDTH, planes, stride, alone=alone, few=3)


@inline
def _plane(words, shift, mask, strip, i, sums):
    """64 codes, less their zeros, times scaled activations; both lie one after another in the order of bytes."""
    zeros = i + STRIP
    sums = multiply_add(i32_to_f32(words >> shift & mask) - load_f32(strip, zeros), load_f32(strip, i), sums)
    x = i32_to_f32(words >> shift + 8 & mask) - load_f32(strip, zeros + 16)
    sums = multiply_add(x, load_f32(strip, i + 16), sums)
    x = i32_to_f32(words >> shift + 16 & mask) - load_f32(strip, zeros + 32)
    sums = multiply_add(x, load_f32(strip, i + 32), sums)
    x = i32_to_f32(words >> shift + 24 & mask) - load_f32(strip, zeros + 48)
    return multiply_add(x, load_f32(strip, i + 48), sums)


@inline
def _read_strip(strip, raw, scales, scale_kind, zeros, zero_kind, column, x, start, width):
    """Zeros, and activations times scales, of some columns of M."""
    unfold(raw, zeros, zero_kind, column + start, width, np.float32(0))
    for i in range(0, width, 64):
        a, b, c, d = load_f32(raw, i), load_f32(raw, i + 16), load_f32(raw, i + 32), load_f32(raw, i + 48)
        store_as_bytes(strip, i + STRIP, a, b, c, d)
    unfold(raw, scales, scale_kind, column + start, width, np.float32(0))
    for i in range(0, width, 64):
        a, b = load_f32(raw, i) * load_f32(x, start + i), load_f32(raw, i + 16) * load_f32(x, start + i + 16)
        c, d = load_f32(raw, i + 32) * load_f32(x, start + i + 32), load_f32(raw, i + 48) * load_f32(x, start + i + 48)
        store_as_bytes(strip, i, a, b, c, d)


def _by_columns(bits):
    """The kernel of axis 0: ``group size`` rows of the weight have the same scales and zeros.

    Items are rows of M for one part of their columns, as wide as a row of the weight, then for the next part: each is
    a row of the weight in every plane.
    """
    planes, mask = PLANES[bits], (1 << bits) - 1

    def multiply_columns(words, scales, zeros, scale_kind, zero_kind, columns, height, x, y, lo, hi):
        inputs = len(x)
        parts, nothing = columns // inputs, np.float32(0)
        strip, raw = scratch(BOTH, np.float32), scratch(STRIP, np.float32)
        begin = lo
        while begin < hi:
            part, first = begin // height, begin % height
            last = min(height, first + hi - begin)
            for start in range(0, inputs, STRIP):
                width = min(STRIP, inputs - start)
                _read_strip(strip, raw, scales, scale_kind, zeros, zero_kind, part * inputs, x, start, width)
                for row in range(first, last):
                    at = row * columns + part * inputs + start
                    a = b = c = d = splat(nothing)
                    for i in range(0, width, 64):
                        read_ahead(words, at + i)
                        given = load_pieces(words, at + i, 0, 1)
                        if planes == 1:  # one chain of sums would be waited for
                            a = a + _plane(given, 0, mask, strip, i, splat(nothing))
                        else:
                            a = _plane(given, 0, mask, strip, i, a)
                            b = _plane(given, bits, mask, strip, i, b)
                        if planes == 4:
                            c = _plane(given, 2 * bits, mask, strip, i, c)
                            d = _plane(given, 3 * bits, mask, strip, i, d)
                    # The lowest bits have the last plane.
                    to = part + parts * ((planes - 1) * height + row)
                    add_part(y, to, total(a), start)
                    if planes >= 2:
                        add_part(y, to - parts * height, total(b), start)
                    if planes == 4:
                        add_part(y, to - 2 * parts * height, total(c), start)
                        add_part(y, to - 3 * parts * height, total(d), start)
            begin += last - first

    multiply_columns.__qualname__ = f"hqq_{bits}.multiply_columns"
    return Shared(multiply_columns)


_BY_COLUMNS = {bits: cache(partial(_by_columns, bits)) for bits in (2, 4, 8)}


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
