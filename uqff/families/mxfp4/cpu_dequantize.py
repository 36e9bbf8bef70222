"""The kernel for MXFP4: the twin of ``MXFP4._dequantize``. The items are blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.simd.bits import float_of
from uqff.simd.compiling import kernel
from uqff.simd.output import Bytes, looked_up, over, put_pair, read_ahead, without_denormals
from uqff.simd.vectors import as_f32, load_codes_4, splat, where_less

if TYPE_CHECKING:
    from uqff.families.mxfp4.tensor import MXFP4

__all__ = ["dequantize"]


def dequantize(weight: MXFP4, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    blocks, scales = weight.parts["blocks"].array(), weight.parts["scales"].array()
    if len(blocks) != 16 * len(scales):
        return False
    over(len(scales), 32, lambda lo, hi: _mxfp4(blocks, scales, out, form, lo, hi))
    return True


@looked_up
def _weights(codes: Any, scale: Any) -> Any:
    """Of nibbles ``s e e m``, what is above them left out: 0 and 1/2 for ``e = 0``, else ``(1 + m/2) * 2**(e - 1)``.

    ``e e m`` above 1 are float32's low exponent bits and high mantissa bit, 126 to be added to the exponent.
    """
    magnitude = codes & 7
    subnormal = where_less(magnitude, 1, splat(0), splat(126 << 23))
    value = where_less(magnitude, 2, subnormal, (magnitude << 22) + (126 << 23))
    return as_f32(value | (codes & 8) << 28) * scale


@kernel
def _mxfp4(blocks: Bytes, scales: Bytes, out: Bytes, form: int, lo: int, hi: int) -> None:
    for block in range(lo, hi):
        read_ahead(blocks, 16 * block)
        # No e2m1 number but zero is below 1/2: it takes a scale of 2**-126 to make a denormal number.
        to = without_denormals(form, scales[block] != 1)
        scale = float_of(np.uint32(scales[block]) << np.uint32(23))
        a, b = load_codes_4(blocks, 16 * block)
        put_pair(out, 32 * block, to, _weights(a, scale), _weights(b, scale))
