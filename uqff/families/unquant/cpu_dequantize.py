"""Unquant by kernels: a plain weight is a GGUF weight of F32, F16 or BF16; other dtypes have none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.families.gguf.cpu_dequantize import KERNELS, WIDTH
from uqff.simd.output import Bytes, over

if TYPE_CHECKING:
    from uqff.families.encoded import Encoded

__all__ = ["dequantize"]


def dequantize(weight: Encoded, out: Bytes, form: int) -> bool:
    """See :data:`uqff.simd.DEQUANTIZERS`."""
    kernel = KERNELS.get(weight.fields["weight"]["dtype"].name)
    if kernel is None or weight.numel < WIDTH:
        return False
    data = weight.payload("weight")
    over(weight.numel, 1, lambda lo, hi: kernel(data, out, form, lo, hi))
    return True
