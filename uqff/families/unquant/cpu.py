"""Unquant by kernels: a cast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.simd.cast import cast, numbers
from uqff.simd.decoding import Decoding
from uqff.simd.output import Bytes

if TYPE_CHECKING:
    from uqff.families.unquant.tensor import Unquant

__all__ = ["decoding", "dequantize"]


def dequantize(weight: Unquant, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    return cast(weight.parts["data"].array(), weight.dtype, out, form)


def decoding(weight: Unquant) -> Decoding | None:
    """See :meth:`QuantizedTensor.decoding`."""
    return numbers(weight.parts["data"].array(), weight.dtype)
