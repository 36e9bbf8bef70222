"""Kernels for HQQ: the twins of ``HQQ._dequantize``; ``(q - zero) * scale``, two roundings.

One kernel an axis: its items are the columns (axis 0) or rows (axis 1) of the packed matrix.  Both take 32 columns at a
time; the last 32 of a row overlap the ones before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.codes import DType
from uqff.kernels.compiling import kernel
from uqff.kernels.numerics import Bytes, f32, f32_lanes, over, put_pair
from uqff.kernels.vectors import LANES, load_f32, load_i32, load_u8, number, store_f32
from uqff.packing import PLANES, bf16_to_float32, f16_to_float32

if TYPE_CHECKING:
    from uqff.families.encoded import Encoded

__all__ = ["dequantize"]

WIDTH = 2 * LANES

STRIP = 2048
"""Elements of the packed matrix that are taken through all rows (axis 0: with their scales and zeros) or all planes
(axis 1) together: once read, they stay in the first-level cache."""


def dequantize(weight: Encoded, out: Bytes, form: int) -> bool:
    """See :data:`uqff.kernels.DEQUANTIZERS`."""
    fields, numel = weight.fields, weight.numel
    bits, axis, group_size = fields["bits"], fields["axis"], fields["group_size"]
    planes, groups = PLANES[bits], numel // group_size
    rows, columns = (group_size, groups) if axis == 0 else (groups, group_size)
    words = weight.payload("w_q")
    dtypes = [fields[name]["dtype"] for name in ("scales", "zeros")]
    if any(dtype is not DType.F32 and dtype not in _WIDENED for dtype in dtypes):
        return False
    scales, zeros = map(_float32, map(weight.payload, ("scales", "zeros")), dtypes)
    height = -(-rows // planes)
    fits = len(words) == height * columns * (4 if bits == 3 else 1) and len(scales) == len(zeros) == 4 * groups
    if columns < WIDTH or not fits:
        return False
    kernel, items = (_columns, columns) if axis == 0 else (_rows, height)
    over(
        items,
        numel // items,
        lambda lo, hi: kernel(words, scales, zeros, bits, planes, rows, columns, out, form, lo, hi),
    )
    return True


_WIDENED = {DType.F16: f16_to_float32, DType.BF16: bf16_to_float32}


def _float32(data: Bytes, dtype: DType) -> Bytes:
    """The bytes of scales or zeros as float32."""
    return data if dtype is DType.F32 else _WIDENED[dtype](data.view(np.uint16)).view(np.uint8)


@kernel
def _load(words: Bytes, at: int, bits: int) -> Any:
    """16 packed elements: I32 for 3 bits, else U8."""
    return load_i32(words, 4 * at) if bits == 3 else load_u8(words, at)


@kernel
def _floats(numbers: Bytes, i: int) -> Any:
    return f32_lanes(load_i32(numbers, 4 * i))


@kernel
def _columns(
    words: Bytes,
    scales: Bytes,
    zeros: Bytes,
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
    strip_zeros, strip_scales = np.empty(STRIP, np.float32), np.empty(STRIP, np.float32)
    for start in range(lo, hi, STRIP):
        # A strip is never narrower than what is written together: the last one overlaps what is before it if need be.
        first = min(start, hi - WIDTH)
        width = min(STRIP, hi - first)
        for column in range(0, width, LANES):
            here = min(column, width - LANES)
            store_f32(strip_zeros, here, _floats(zeros, first + here))
            store_f32(strip_scales, here, _floats(scales, first + here))
        for row in range(height):
            for column in range(0, width, WIDTH):
                here = min(column, width - WIDTH)
                at = row * columns + first + here
                zero_a, scale_a = load_f32(strip_zeros, here), load_f32(strip_scales, here)
                zero_b, scale_b = load_f32(strip_zeros, here + LANES), load_f32(strip_scales, here + LANES)
                if bits == 8:
                    x = (number(load_u8(words, at)) - zero_a) * scale_a
                    y = (number(load_u8(words, at + LANES)) - zero_b) * scale_b
                    put_pair(out, at, form, x, y)
                    continue
                a, b = _load(words, at, bits), _load(words, at + LANES, bits)
                for plane in range(min(planes, (rows - row + height - 1) // height)):
                    shift = bits * (planes - 1 - plane)
                    x = (number(a >> shift & mask) - zero_a) * scale_a
                    y = (number(b >> shift & mask) - zero_b) * scale_b
                    put_pair(out, at + plane * height * columns, form, x, y)


@kernel
def _rows(
    words: Bytes,
    scales: Bytes,
    zeros: Bytes,
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
    step = max(1, STRIP // columns)
    for begin in range(lo, hi, step):
        for plane in range(planes):
            shift = bits * (planes - 1 - plane)
            for row in range(begin, min(begin + step, hi, rows - plane * height)):
                into = plane * height + row
                zero, scale = f32(zeros, 4 * into), f32(scales, 4 * into)
                for start in range(0, columns, WIDTH):
                    column = min(start, columns - WIDTH)
                    at = row * columns + column
                    x = (number(_load(words, at, bits) >> shift & mask) - zero) * scale
                    y = (number(_load(words, at + LANES, bits) >> shift & mask) - zero) * scale
                    put_pair(out, into * columns + column, form, x, y)
