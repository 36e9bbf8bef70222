"""The packed codes of HQQ, as parts: rows of M in words, on the CPU by numpy, elsewhere by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.codes import DType
from uqff.families.part import Bytes, Part, concatenated
from uqff.numerics.packing import PLANES, pack_planes, unpack_planes

if TYPE_CHECKING:
    import torch

__all__ = ["as_uint8", "narrow_codes", "pack_rows", "planned_codes", "unpack_rows", "word_dtype"]


def word_dtype(bits: int) -> DType:
    """The dtype of ``w_q``: 3-bit codes come ten to an I32, all others fill a U8."""
    return DType.I32 if bits == 3 else DType.U8


def planned_codes(shape: tuple[int, int], bits: int) -> Part:
    """What :func:`pack_rows` makes of codes ``[rows, columns]``, without bytes."""
    rows, columns = shape
    return Part.planned((-(-rows // PLANES[bits]), columns * word_dtype(bits).itemsize), DType.U8)


def as_uint8(codes: Any) -> Bytes:
    """Integers of numpy or torch, cast."""
    if isinstance(codes, np.ndarray):
        return codes.astype(np.uint8, copy=False)
    import torch

    made: torch.Tensor = codes.to(torch.uint8)
    return made


def pack_rows(codes: Bytes, bits: int) -> Part:
    """Pack a matrix of codes, uint8 ``[rows, columns]``, along its rows: ``w_q``."""
    on_cpu = codes if isinstance(codes, np.ndarray) else codes.cpu().numpy()
    part = Part.of_array(pack_planes(on_cpu, bits), word_dtype(bits)).as_bytes()
    return part if isinstance(codes, np.ndarray) else part.to(codes.device)


def unpack_rows(words: Any, bits: int) -> Bytes:
    """The rows of a packed matrix, ``[h, columns]`` to uint8 ``[p·h, columns]``; the highest bits come first."""
    if isinstance(words, np.ndarray):
        return unpack_planes(words, bits)
    top = PLANES[bits] - 1
    made: Bytes = concatenated([as_uint8(words >> bits * (top - i) & (1 << bits) - 1) for i in range(top + 1)])
    return made


def narrow_codes(
    w_q: Part, bits: int, axis: int, columns: int, ranges: tuple[int, int, int, int, int], shape: tuple[int, int]
) -> Part:
    """The packed codes of a slice, which is one range in each run of the flattened weight.

    Args:
        w_q: the packed codes of the whole.
        bits: of a code.
        axis: of the groups.
        columns: of the matrix whose rows are packed.
        ranges: number of runs, elements of a run, elements that one step of the dimension passes over, first step and
            number of steps of the slice.
        shape: of the matrix of the slice.
    """
    count, run, step, start, length = ranges
    begin, n = start * step, length * step
    if w_q.is_planned:
        return planned_codes(shape, bits)
    if bits == 8:  # not packed: the bytes are the flattened weight
        return w_q.view((count, run)).narrow(1, begin, n).view(shape)
    if axis == 0 and columns % run == 0:  # whole runs in each row: a range of each, as packed
        height, width = w_q.shape[0], w_q.shape[1] // columns
        packed = w_q.view((height, columns // run, run * width)).narrow(2, begin * width, n * width)
        return packed.view((height, columns // run * n * width))
    words = w_q.words(word_dtype(bits))
    codes = [_codes(words, bits, columns, i * run + begin, i * run + begin + n) for i in range(count)]
    return pack_rows(concatenated(codes).reshape(shape), bits)


def _codes(words: Any, bits: int, columns: int, begin: int, end: int) -> Bytes:
    """The codes ``begin`` to ``end`` of the flattened weight, uint8; touches no words but theirs."""
    height, top, pieces = len(words), PLANES[bits] - 1, []
    while begin < end:
        row, column = divmod(begin, columns)
        n = min(columns - column, end - begin)
        shift = bits * (top - row // height)
        pieces.append(as_uint8(words[row % height, column : column + n] >> shift & (1 << bits) - 1))
        begin += n
    made: Bytes = concatenated(pieces)
    return made
