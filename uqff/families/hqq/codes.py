"""The packed codes of HQQ, as parts: rows of M in words, on the CPU by numpy, elsewhere by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.codes import DType
from uqff.families.part import Bytes, Part, concatenated
from uqff.numerics.packing import PLANES, pack_planes, unpack_planes

if TYPE_CHECKING:
    import torch

__all__ = ["as_uint8", "pack_rows", "planned_codes", "unpack_rows", "word_dtype"]


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
