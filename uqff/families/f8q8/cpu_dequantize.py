"""The kernel for F8Q8: the twin of ``F8Q8._dequantize``. The items are blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uqff.numerics.packing import e4m3_to_float32
from uqff.simd.compiling import kernel
from uqff.simd.output import F32, Bytes, over, put_pair, read_ahead, without_denormals
from uqff.simd.vectors import first_signed, load_bytes, second_signed

if TYPE_CHECKING:
    from uqff.families.f8q8.tensor import F8Q8

__all__ = ["dequantize"]

SCALES = e4m3_to_float32(np.arange(256, dtype=np.uint8)) / np.float32(416)
"""Of each stored byte."""


def dequantize(weight: F8Q8, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    blocks, numel = weight.parts["blocks"].array(), weight.numel
    whole, rest = divmod(numel, 32)
    if len(blocks) < 33 * -(-numel // 32):
        return False
    over(whole, 32, lambda lo, hi: _f8q8(blocks, out, form, lo, hi))
    if rest:
        size = 4 if form == F32 else 2
        last = np.empty(32 * size, np.uint8)
        _f8q8(blocks[33 * whole :], last, form, 0, 1)
        out[32 * size * whole :] = last[: size * rest]
    return True


@kernel
def _f8q8(blocks: Bytes, out: Bytes, form: int, lo: int, hi: int) -> None:
    # A scale is at least 2**-18, and the codes are integers.
    form = without_denormals(form, True)
    for block in range(lo, hi):
        at = 33 * block
        read_ahead(blocks, at)
        d = SCALES[blocks[at]]
        codes = load_bytes(blocks, at + 1)
        put_pair(out, 32 * block, form, first_signed(codes) * d, second_signed(codes) * d)
