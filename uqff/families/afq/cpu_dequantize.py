"""Kernels for AFQ: the twins of ``AFQ._dequantize``. The items are groups; ``q * scale + bias``, two roundings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.simd.compiling import inline, kernel
from uqff.simd.output import FORMS, Bytes, looked_up, over, put_pair, read_ahead, unfold, without_denormals
from uqff.simd.scratch import scratch
from uqff.simd.vectors import LANES, load_codes_3, load_codes_4, load_codes_6, load_u8, number, ramp, splat, word

if TYPE_CHECKING:
    from uqff.families.afq.tensor import AFQ

__all__ = ["dequantize"]

STRIP = 512
"""Groups whose scales and biases are read together."""


def dequantize(weight: AFQ, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    parts, bits, group = weight.parts, weight.bits, weight.group_size
    kernel, codes, scales, biases = _KERNELS[bits], *(parts[name].array() for name in ("w_q", "scales", "biases"))
    dtype = parts["scales"].dtype
    if dtype not in FORMS or parts["biases"].dtype is not dtype or group % (2 * LANES):
        return False
    if not len(codes) * 8 // bits // group * dtype.itemsize == len(scales) == len(biases):
        return False
    kind = FORMS[dtype]
    over(
        weight.numel // group,
        group,
        lambda lo, hi: kernel(codes, scales, biases, kind, group, out, form, lo, hi),
    )
    return True


@looked_up
def _weights(codes: Any, mask: int, scale: Any, bias: Any) -> Any:
    return number(codes & mask) * scale + bias


@inline
def _load(codes: Bytes, i: int, bits: int) -> Any:
    """Codes ``[i, i + 32)``."""
    if bits == 2:
        return splat(word(codes, i >> 2)) >> ramp(2, 16), splat(word(codes, (i >> 2) + 4)) >> ramp(2, 16)
    at = 4 * bits * (i >> 5)
    if bits == 3:
        return load_codes_3(codes, at)
    if bits == 4:
        return load_codes_4(codes, at)
    return load_codes_6(codes, at) if bits == 6 else (load_u8(codes, at), load_u8(codes, at + LANES))


@inline
def _afq(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, bits: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    mask = (1 << bits) - 1
    strip_scales, strip_biases = scratch(STRIP, np.float32), scratch(STRIP, np.float32)
    for begin in range(lo, hi, STRIP):
        count = min(STRIP, hi - begin)
        # If both are multiples of 2**-126, the weights are.
        certain = unfold(strip_scales, scales, kind, begin, count, np.float32(2.0**-103))
        certain &= unfold(strip_biases, biases, kind, begin, count, np.float32(2.0**-103))
        to = without_denormals(form, certain)
        for group in range(count):
            scale, bias = strip_scales[group], strip_biases[group]
            for i in range((begin + group) * size, (begin + group + 1) * size, 2 * LANES):
                read_ahead(codes, i * bits >> 3)
                a, b = _load(codes, i, bits)
                if bits <= 4:
                    x, y = _weights(a, mask, scale, bias), _weights(b, mask, scale, bias)
                else:
                    x, y = number(a & mask) * scale + bias, number(b & mask) * scale + bias
                put_pair(out, i, to, x, y)


@kernel
def _afq2(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    _afq(codes, scales, biases, kind, 2, size, out, form, lo, hi)


@kernel
def _afq3(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    _afq(codes, scales, biases, kind, 3, size, out, form, lo, hi)


@kernel
def _afq4(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    _afq(codes, scales, biases, kind, 4, size, out, form, lo, hi)


@kernel
def _afq6(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    _afq(codes, scales, biases, kind, 6, size, out, form, lo, hi)


@kernel
def _afq8(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    _afq(codes, scales, biases, kind, 8, size, out, form, lo, hi)


_KERNELS = {2: _afq2, 3: _afq3, 4: _afq4, 6: _afq6, 8: _afq8}
