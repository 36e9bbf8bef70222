"""HQQ on the GPU: what :mod:`uqff.gpu` needs to know of a weight; ``gpu.cu`` decodes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.gpu.source import Stored
from uqff.numerics.packing import packed_rows

if TYPE_CHECKING:
    from uqff.families.hqq.tensor import HQQ

__all__ = ["stored"]


def stored(weight: HQQ) -> Stored | None:
    """Codes, scales and zeros; M is seen as rows of ``columns`` codes."""
    scales, zeros, w_q = weight.parts["scales"], weight.parts["zeros"], weight.parts["w_q"]
    groups = weight.numel // weight.group_size
    columns = groups if weight.axis == 0 else weight.group_size
    rows = weight.numel // columns
    fits = scales.shape == zeros.shape == ((1, groups) if weight.axis == 0 else (groups, 1))
    height = packed_rows(rows, weight.bits)
    if not fits or scales.dtype is not zeros.dtype or w_q.shape != (height, columns * (4 if weight.bits == 3 else 1)):
        return None
    decoder = f"Hqq<{weight.bits}, {weight.axis}, {scales.dtype.name}>"
    return Stored("hqq", decoder, (weight.w_q, weight.scales, weight.zeros), (columns, height), alignment=16)
