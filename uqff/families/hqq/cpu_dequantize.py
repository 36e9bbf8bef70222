"""Kernels for HQQ: the twins of ``HQQ._dequantize``; ``(q - zero) * scale``, two roundings.

One kernel an axis: its items are the columns (axis 0) or rows (axis 1) of the packed matrix.  Both take 32 columns at a
time; the last 32 of a row overlap the ones before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.numerics.packing import PLANES
from uqff.simd.compiling import inline, kernel
from uqff.simd.output import (
    AHEAD,
    FORMS,
    Bytes,
    looked_up,
    over,
    put_pair,
    put_pair_here,
    reach,
    read_ahead,
    unfold,
    without_denormals,
    write_ahead,
)
from uqff.simd.scratch import scratch
from uqff.simd.vectors import LANES, load_f32, load_i32, load_u8, number, prefetch_read

if TYPE_CHECKING:
    from uqff.families.hqq.tensor import HQQ

__all__ = ["dequantize"]

WIDTH = 2 * LANES

STRIP = 2048
"""Elements of the packed matrix that are taken through all rows (axis 0: with their scales and zeros) or all planes
(axis 1) together: once read, they stay in the first-level cache."""

LEAST = np.float32(2.0**-63)
"""If zeros and scales are 0 or at least this, no weight is denormal: a code less a zero is 0, or minus the zero, or at
least 2**-24, of which a zero near a code from 1 on is a multiple. Two numbers of at least this make 2**-126."""


def dequantize(weight: HQQ, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    parts, numel = weight.parts, weight.numel
    bits, axis, group_size = weight.bits, weight.axis, weight.group_size
    planes, groups = PLANES[bits], numel // group_size
    rows, columns = (group_size, groups) if axis == 0 else (groups, group_size)
    words, scales, zeros = (parts[name].array() for name in ("w_q", "scales", "zeros"))
    scale_dtype, zero_dtype = parts["scales"].dtype, parts["zeros"].dtype
    if scale_dtype not in FORMS or zero_dtype not in FORMS:
        return False
    kinds = FORMS[scale_dtype], FORMS[zero_dtype]
    height = -(-rows // planes)
    fits = len(words) == height * columns * (4 if bits == 3 else 1)
    fits &= len(scales) == groups * scale_dtype.itemsize and len(zeros) == groups * zero_dtype.itemsize
    if columns < WIDTH or not fits:
        return False
    kernel, items = (_columns, columns) if axis == 0 else (_rows, height)
    over(
        items,
        numel // items,
        lambda lo, hi: kernel(words, scales, zeros, *kinds, bits, planes, rows, columns, out, form, lo, hi),
    )
    return True


@inline
def _load(words: Bytes, at: int, bits: int) -> Any:
    """16 packed elements: I32 for 3 bits, else U8."""
    return load_i32(words, 4 * at) if bits == 3 else load_u8(words, at)


@looked_up
def _weights(codes: Any, mask: int, zero: Any, scale: Any) -> Any:
    return (number(codes & mask) - zero) * scale


@inline
def _onward(here: int, steps: int, width: int, columns: int) -> Any:
    """Elements from one in a row of a strip to the one that is taken so many steps later, perhaps in the next row."""
    return steps if here + steps < width else steps + columns - width


@kernel
def _columns(
    words: Bytes,
    scales: Bytes,
    zeros: Bytes,
    scale_kind: int,
    zero_kind: int,
    bits: int,
    planes: int,
    rows: int,
    columns: int,
    out: Bytes,
    form: int,
    lo: int,
    hi: int,
) -> None:
    height, mask, size = (rows + planes - 1) // planes, (1 << bits) - 1, 4 if bits == 3 else 1
    strip_zeros, strip_scales = scratch(STRIP, np.float32), scratch(STRIP, np.float32)
    for start in range(lo, hi, STRIP):
        # A strip is never narrower than what is written together: the last one overlaps what is before it if need be.
        first = min(start, hi - WIDTH)
        width = min(STRIP, hi - first)
        certain = unfold(strip_zeros, zeros, zero_kind, first, width, LEAST)
        certain &= unfold(strip_scales, scales, scale_kind, first, width, LEAST)
        to = without_denormals(form, certain)
        for row in range(height):
            for column in range(0, width, WIDTH):
                here = min(column, width - WIDTH)
                at = row * columns + first + here
                prefetch_read(words, size * (at + _onward(here, AHEAD // size, width, columns)))
                ahead = _onward(here, reach(to), width, columns)
                zero_a, scale_a = load_f32(strip_zeros, here), load_f32(strip_scales, here)
                zero_b, scale_b = load_f32(strip_zeros, here + LANES), load_f32(strip_scales, here + LANES)
                if bits == 8:
                    x = (number(load_u8(words, at)) - zero_a) * scale_a
                    y = (number(load_u8(words, at + LANES)) - zero_b) * scale_b
                    write_ahead(out, at, to, ahead)
                    put_pair_here(out, at, to, x, y)
                    continue
                a, b = _load(words, at, bits), _load(words, at + LANES, bits)
                for plane in range(min(planes, (rows - row + height - 1) // height)):
                    shift = bits * (planes - 1 - plane)
                    x = (number(a >> shift & mask) - zero_a) * scale_a
                    y = (number(b >> shift & mask) - zero_b) * scale_b
                    write_ahead(out, at + plane * height * columns, to, ahead)
                    put_pair_here(out, at + plane * height * columns, to, x, y)


@kernel
def _rows(
    words: Bytes,
    scales: Bytes,
    zeros: Bytes,
    scale_kind: int,
    zero_kind: int,
    bits: int,
    planes: int,
    rows: int,
    columns: int,
    out: Bytes,
    form: int,
    lo: int,
    hi: int,
) -> None:
    height, mask = (rows + planes - 1) // planes, (1 << bits) - 1
    step, size = max(1, STRIP // columns), 4 if bits == 3 else 1
    strip_zeros, strip_scales = scratch(STRIP, np.float32), scratch(STRIP, np.float32)
    for begin in range(lo, hi, step):
        for plane in range(planes):
            shift = bits * (planes - 1 - plane)
            first, count = plane * height + begin, min(step, hi - begin, rows - plane * height - begin)
            certain = unfold(strip_zeros, zeros, zero_kind, first, count, LEAST)
            certain &= unfold(strip_scales, scales, scale_kind, first, count, LEAST)
            to = without_denormals(form, certain)
            for row in range(count):
                zero, scale = strip_zeros[row], strip_scales[row]
                for start in range(0, columns, WIDTH):
                    column = min(start, columns - WIDTH)
                    at = (begin + row) * columns + column
                    if plane == 0:
                        read_ahead(words, at * size)
                    if bits == 8:
                        x = (number(load_u8(words, at)) - zero) * scale
                        y = (number(load_u8(words, at + LANES)) - zero) * scale
                    else:
                        x = _weights(_load(words, at, bits) >> shift, mask, zero, scale)
                        y = _weights(_load(words, at + LANES, bits) >> shift, mask, zero, scale)
                    put_pair(out, (first + row) * columns + column, to, x, y)
