"""Kernels for HQQ: the twins of ``HQQ._dequantize``; ``(q - zero) * scale``, two roundings.

One kernel an axis: its items are the columns (axis 0) or rows (axis 1) of the packed matrix, and one load of 16 packed
elements gives 16 codes of every plane.  A last vector of fewer than 16 columns overlaps the one before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.kernels.memory import bytes_of
from uqff.kernels.numerics import Bytes, f32, f32_lanes, over, put
from uqff.kernels.vectors import LANES, kernel, load_i32, load_u8, number

if TYPE_CHECKING:
    from uqff.families.hqq import HQQ

__all__ = ["dequantize"]


def dequantize(record: HQQ, out: Bytes, form: int) -> bool:
    """See :func:`uqff.kernels.dequantize`."""
    import torch

    from uqff.families.hqq import CODES_PER_WORD

    bits, planes = record.bits, CODES_PER_WORD[record.bits]
    groups = record.numel // record.group_size
    rows, columns = (record.group_size, groups) if record.axis == 0 else (groups, record.group_size)
    if columns < LANES:
        return False
    words = bytes_of(record.w_q)
    scales, zeros = (bytes_of(part.to(torch.float32)) for part in (record.scales, record.zeros))
    height = -(-rows // planes)
    kernel, items = (_columns, columns) if record.axis == 0 else (_rows, height)
    over(
        items,
        record.numel // items,
        lambda lo, hi: kernel(words, scales, zeros, bits, planes, rows, columns, out, form, lo, hi),
    )
    return True


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
    for row in range(height):
        for start in range(lo, hi, LANES):
            column = min(start, hi - LANES)
            at = row * columns + column
            word = load_i32(words, 4 * at) if bits == 3 else load_u8(words, at)
            zero, scale = f32_lanes(load_i32(zeros, 4 * column)), f32_lanes(load_i32(scales, 4 * column))
            for plane in range(planes):
                into = plane * height + row
                if into < rows:
                    q = word >> bits * (planes - 1 - plane) & mask
                    put(out, into * columns + column, form, (number(q) - zero) * scale)


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
    for plane in range(planes):
        shift = bits * (planes - 1 - plane)
        for row in range(lo, min(hi, rows - plane * height)):
            into = plane * height + row
            zero, scale = f32(zeros, 4 * into), f32(scales, 4 * into)
            for start in range(0, columns, LANES):
                column = min(start, columns - LANES)
                at = row * columns + column
                word = load_i32(words, 4 * at) if bits == 3 else load_u8(words, at)
                put(out, into * columns + column, form, (number(word >> shift & mask) - zero) * scale)
