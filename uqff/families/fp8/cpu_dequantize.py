"""The FP8 kernel, the twin of ``FP8._dequantize``. The items are weights; the last 32 overlap the ones before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uqff.simd.compiling import kernel
from uqff.simd.output import Bytes, e4m3_pair, f32, over, put_pair, read_ahead, without_denormals, zero_or_from
from uqff.simd.vectors import LANES, load_bytes

if TYPE_CHECKING:
    from uqff.families.fp8.tensor import FP8

__all__ = ["dequantize"]

WIDTH = 2 * LANES


def dequantize(weight: FP8, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    codes, scale = weight.parts["weight"].array(), weight.parts["dequant_w_scale"].array()
    if weight.numel < WIDTH or len(scale) != 4:
        return False
    over(weight.numel, 1, lambda lo, hi: _fp8(codes, scale, out, form, lo, hi))
    return True


@kernel
def _fp8(codes: Bytes, scale: Bytes, out: Bytes, form: int, lo: int, hi: int) -> None:
    d = f32(scale, 0)
    # No e4m3 number but zero is below 2**-9.
    form = without_denormals(form, zero_or_from(np.float32(2.0**-117), d))
    for start in range(lo, hi, WIDTH):
        at = min(start, hi - WIDTH)
        read_ahead(codes, at)
        x, y = e4m3_pair(load_bytes(codes, at))
        put_pair(out, at, form, x * d, y * d)
