"""The kernel for MXFP4: the twin of ``MXFP4._dequantize``. The items are blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.kernels.bits import float_of
from uqff.kernels.compiling import kernel
from uqff.kernels.numerics import Bytes, over, put_pair
from uqff.kernels.vectors import as_f32, load_codes_4, splat, where_less

if TYPE_CHECKING:
    from uqff.families.encoded import Encoded

__all__ = ["dequantize"]


def dequantize(weight: Encoded, out: Bytes, form: int) -> bool:
    """See :data:`uqff.kernels.DEQUANTIZERS`."""
    blocks, scales = weight.payload("blocks"), weight.payload("scales")
    if len(blocks) != 16 * len(scales):
        return False
    over(len(scales), 32, lambda lo, hi: _mxfp4(blocks, scales, out, form, lo, hi))
    return True


@kernel
def _e2m1(nibbles: Any) -> Any:
    """The values of 16 nibbles ``s e e m``: 0 and 1/2 for ``e = 0``, else ``(1 + m/2) * 2**(e - 1)``.

    ``e e m`` above 1 are float32's low exponent bits and high mantissa bit, 126 to be added to the exponent.
    """
    magnitude = nibbles & 7
    subnormal = where_less(magnitude, 1, splat(0), splat(126 << 23))
    value = where_less(magnitude, 2, subnormal, (magnitude << 22) + (126 << 23))
    return as_f32(value | (nibbles & 8) << 28)


@kernel
def _mxfp4(blocks: Bytes, scales: Bytes, out: Bytes, form: int, lo: int, hi: int) -> None:
    for block in range(lo, hi):
        scale = float_of(np.uint32(scales[block]) << np.uint32(23))
        a, b = _e2m1(load_codes_4(blocks, 16 * block)), _e2m1(load_codes_4(blocks, 16 * block + 8))
        put_pair(out, 32 * block, form, a * scale, b * scale)
