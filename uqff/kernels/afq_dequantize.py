"""Kernels for AFQ: the twins of ``AFQ._dequantize``. The items are groups; ``q * scale + bias``, two roundings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.codes import DType
from uqff.kernels.compiling import kernel
from uqff.kernels.memory import bytes_of
from uqff.kernels.numerics import (
    BF16,
    F16,
    F32,
    Bytes,
    looked_up,
    over,
    plain,
    put_pair,
    read_ahead,
    without_denormals,
    zero_or_from,
)
from uqff.kernels.vectors import LANES, load_codes_3, load_codes_4, load_codes_6, load_u8, number, ramp, splat, word

if TYPE_CHECKING:
    from uqff.families.afq import AFQ

__all__ = ["dequantize"]

_SCALES = {DType.F32: F32, DType.BF16: BF16, DType.F16: F16}


def dequantize(record: AFQ, out: Bytes, form: int) -> bool:
    """See :func:`uqff.kernels.dequantize`."""
    kernel, group = _KERNELS[record.bits], record.group_size
    codes, scales, biases = (bytes_of(part) for part in (record.w_q, record.scales, record.biases))
    dtype = DType.of_torch(record.scales.dtype)
    if dtype not in _SCALES or record.biases.dtype != record.scales.dtype or group % (2 * LANES):
        return False
    if not len(codes) * 8 // record.bits // group * dtype.itemsize == len(scales) == len(biases):
        return False
    kind = _SCALES[dtype]
    over(
        record.numel // group,
        group,
        lambda lo, hi: kernel(codes, scales, biases, kind, group, out, form, lo, hi),
    )
    return True


@kernel
def _form(form: int, scale: Any, bias: Any) -> Any:
    """Of a group: if both are multiples of 2**-126, the weights are."""
    least = np.float32(2.0**-103)
    return without_denormals(form, zero_or_from(least, scale) and zero_or_from(least, bias))


@looked_up
def _weights(codes: Any, mask: int, scale: Any, bias: Any) -> Any:
    return number(codes & mask) * scale + bias


@kernel
def _codes_2(codes: Bytes, i: int) -> Any:
    return splat(word(codes, i >> 2)) >> ramp(2, 16)


@kernel
def _afq2(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    for group in range(lo, hi):
        scale, bias = plain(scales, group, kind), plain(biases, group, kind)
        to = _form(form, scale, bias)
        for i in range(group * size, (group + 1) * size, 2 * LANES):
            read_ahead(codes, i >> 2)
            a, b = _codes_2(codes, i), _codes_2(codes, i + LANES)
            put_pair(out, i, to, _weights(a, 0x03, scale, bias), _weights(b, 0x03, scale, bias))


@kernel
def _afq3(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    for group in range(lo, hi):
        scale, bias = plain(scales, group, kind), plain(biases, group, kind)
        to = _form(form, scale, bias)
        for i in range(group * size, (group + 1) * size, 2 * LANES):
            at = 12 * (i >> 5)
            read_ahead(codes, at)
            a, b = load_codes_3(codes, at)
            put_pair(out, i, to, _weights(a, 0x07, scale, bias), _weights(b, 0x07, scale, bias))


@kernel
def _afq4(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    for group in range(lo, hi):
        scale, bias = plain(scales, group, kind), plain(biases, group, kind)
        to = _form(form, scale, bias)
        for i in range(group * size, (group + 1) * size, 2 * LANES):
            at = i >> 1
            read_ahead(codes, at)
            a, b = load_codes_4(codes, at)
            put_pair(out, i, to, _weights(a, 0x0F, scale, bias), _weights(b, 0x0F, scale, bias))


@kernel
def _afq6(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    for group in range(lo, hi):
        scale, bias = plain(scales, group, kind), plain(biases, group, kind)
        to = _form(form, scale, bias)
        for i in range(group * size, (group + 1) * size, 2 * LANES):
            at = 24 * (i >> 5)
            read_ahead(codes, at)
            a, b = load_codes_6(codes, at)
            put_pair(out, i, to, number(a & 0x3F) * scale + bias, number(b & 0x3F) * scale + bias)


@kernel
def _afq8(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    for group in range(lo, hi):
        scale, bias = plain(scales, group, kind), plain(biases, group, kind)
        to = _form(form, scale, bias)
        for i in range(group * size, (group + 1) * size, 2 * LANES):
            read_ahead(codes, i)
            a, b = number(load_u8(codes, i)), number(load_u8(codes, i + LANES))
            put_pair(out, i, to, a * scale + bias, b * scale + bias)


_KERNELS = {2: _afq2, 3: _afq3, 4: _afq4, 6: _afq6, 8: _afq8}
