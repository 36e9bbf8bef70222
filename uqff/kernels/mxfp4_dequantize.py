"""The kernel for MXFP4: the twin of ``MXFP4._dequantize``. The items are blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.kernels.bits import float_of
from uqff.kernels.compiling import kernel
from uqff.kernels.memory import bytes_of
from uqff.kernels.numerics import Bytes, f16_pair, over, put_pair, read_ahead, without_denormals
from uqff.kernels.vectors import load_nibble_words

if TYPE_CHECKING:
    from uqff.families.mxfp4 import MXFP4

__all__ = ["dequantize"]


def dequantize(record: MXFP4, out: Bytes, form: int) -> bool:
    """See :func:`uqff.kernels.dequantize`."""
    blocks, scales = bytes_of(record.blocks), bytes_of(record.scales)
    if len(blocks) != 16 * len(scales):
        return False
    over(len(scales), 32, lambda lo, hi: _mxfp4(blocks, scales, out, form, lo, hi))
    return True


@kernel
def _e2m1_pair(nibbles: Any) -> Any:
    """The values of 32 nibbles ``s e e m``: float16 has the same fields, wider ones, and a bias larger by 14."""
    x, y = f16_pair(nibbles << 12 & 0x8000 | nibbles << 9 & 0x0E00)
    return x * np.float32(2.0**14), y * np.float32(2.0**14)


@kernel
def _mxfp4(blocks: Bytes, scales: Bytes, out: Bytes, form: int, lo: int, hi: int) -> None:
    for block in range(lo, hi):
        read_ahead(blocks, 16 * block)
        # No e2m1 number but zero is below 1/2: it takes a scale of 2**-126 to make a denormal number.
        to = without_denormals(form, scales[block] != 1)
        scale = float_of(np.uint32(scales[block]) << np.uint32(23))
        x, y = _e2m1_pair(load_nibble_words(blocks, 16 * block))
        put_pair(out, 32 * block, to, x * scale, y * scale)
