"""Unquant by kernels: a plain weight is a GGUF weight of F32, F16 or BF16; other dtypes have none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.kernels.gguf_dequantize import KERNELS, WIDTH
from uqff.kernels.memory import bytes_of
from uqff.kernels.numerics import Bytes, over

if TYPE_CHECKING:
    from uqff.families.unquant import Unquant

__all__ = ["dequantize"]


def dequantize(record: Unquant, out: Bytes, form: int) -> bool:
    """See :func:`uqff.kernels.dequantize`."""
    kernel = KERNELS.get(record.dtype.name)
    if kernel is None or record.numel < WIDTH:
        return False
    data = bytes_of(record.data)
    over(record.numel, 1, lambda lo, hi: kernel(data, out, form, lo, hi))
    return True
