"""Kernels for AFQ: the twins of ``AFQ._dequantize``. The items are groups; ``q * scale + bias``, two roundings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uqff.codes import DType
from uqff.kernels.compiling import kernel
from uqff.kernels.numerics import BF16, F16, F32, Bytes, over, plain, put_pair
from uqff.kernels.vectors import LANES, load_codes_3, load_codes_4, load_codes_6, load_u8, number, ramp, splat, word

if TYPE_CHECKING:
    from uqff.families.encoded import Encoded

__all__ = ["dequantize"]

_SCALES = {DType.F32: F32, DType.BF16: BF16, DType.F16: F16}


def dequantize(weight: Encoded, out: Bytes, form: int) -> bool:
    """See :data:`uqff.kernels.DEQUANTIZERS`."""
    fields = weight.fields
    bits, group = fields["bits"], fields["group_size"]
    kernel, codes, scales, biases = _KERNELS[bits], *map(weight.payload, ("w_q", "scales", "biases"))
    dtype = fields["scales"]["dtype"]
    if dtype not in _SCALES or fields["biases"]["dtype"] is not dtype or group % (2 * LANES):
        return False
    if not len(codes) * 8 // bits // group * dtype.itemsize == len(scales) == len(biases):
        return False
    kind = _SCALES[dtype]
    over(
        weight.numel // group,
        group,
        lambda lo, hi: kernel(codes, scales, biases, kind, group, out, form, lo, hi),
    )
    return True


@kernel
def _codes_2(codes: Bytes, i: int) -> Any:
    return splat(word(codes, i >> 2)) >> ramp(2, 16) & 0x03


@kernel
def _afq2(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    for group in range(lo, hi):
        scale, bias = plain(scales, group, kind), plain(biases, group, kind)
        for i in range(group * size, (group + 1) * size, 2 * LANES):
            a, b = number(_codes_2(codes, i)), number(_codes_2(codes, i + LANES))
            put_pair(out, i, form, a * scale + bias, b * scale + bias)


@kernel
def _afq3(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    for group in range(lo, hi):
        scale, bias = plain(scales, group, kind), plain(biases, group, kind)
        for i in range(group * size, (group + 1) * size, 2 * LANES):
            at = 6 * (i // LANES)
            a, b = number(load_codes_3(codes, at)), number(load_codes_3(codes, at + 6))
            put_pair(out, i, form, a * scale + bias, b * scale + bias)


@kernel
def _afq4(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    for group in range(lo, hi):
        scale, bias = plain(scales, group, kind), plain(biases, group, kind)
        for i in range(group * size, (group + 1) * size, 2 * LANES):
            at = 8 * (i // LANES)
            a, b = number(load_codes_4(codes, at)), number(load_codes_4(codes, at + 8))
            put_pair(out, i, form, a * scale + bias, b * scale + bias)


@kernel
def _afq6(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    for group in range(lo, hi):
        scale, bias = plain(scales, group, kind), plain(biases, group, kind)
        for i in range(group * size, (group + 1) * size, 2 * LANES):
            at = 12 * (i // LANES)
            a, b = number(load_codes_6(codes, at)), number(load_codes_6(codes, at + 12))
            put_pair(out, i, form, a * scale + bias, b * scale + bias)


@kernel
def _afq8(
    codes: Bytes, scales: Bytes, biases: Bytes, kind: int, size: int, out: Bytes, form: int, lo: int, hi: int
) -> None:
    for group in range(lo, hi):
        scale, bias = plain(scales, group, kind), plain(biases, group, kind)
        for i in range(group * size, (group + 1) * size, 2 * LANES):
            a, b = number(load_u8(codes, i)), number(load_u8(codes, i + LANES))
            put_pair(out, i, form, a * scale + bias, b * scale + bias)


_KERNELS = {2: _afq2, 3: _afq3, 4: _afq4, 6: _afq6, 8: _afq8}
