"""AFQ on the CPU: bit-equal twins of :mod:`uqff.families.afq.reference`.

Dequantising, the items are groups; ``q * scale + bias``, two roundings.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.afq import reference
from uqff.simd.arithmetic import half_away
from uqff.simd.bits import bits_of, float_of, pack8
from uqff.simd.compiling import inline, kernel
from uqff.simd.decoding import Decoder, Decoding
from uqff.simd.fitting import affine_blocks
from uqff.simd.load_store import (
    load_codes_3,
    load_codes_4,
    load_codes_6,
    load_i32,
    load_u8,
    load_u24,
    load_u32,
)
from uqff.simd.output import FORMS, Bytes, looked_up, put_pair, read_ahead, unfold, without_subnormals
from uqff.simd.planes import BYTES, in_order, weigh_four_rounded
from uqff.simd.scratch import scratch
from uqff.simd.threads import run_ranges
from uqff.simd.vectors import LANES, halves, i32_to_f32, quarters, ramp, splat, total

if TYPE_CHECKING:
    from uqff.families.afq.tensor import AFQ

__all__ = ["decoding", "dequantize", "quantize", "search"]

STRIP = 512
"""Groups whose scales and biases are read together."""


def dequantize(weight: AFQ, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    groups = decoding(weight)
    if groups is None:
        return False
    groups.dequantize(out, form)
    return True


def decoding(weight: AFQ) -> Decoding | None:
    """See :meth:`QuantizedTensor.decoding`."""
    parts, bits, group = weight.parts, weight.bits, weight.group_size
    codes, scales, biases = (parts[name].array() for name in ("w_q", "scales", "biases"))
    dtype = parts["scales"].dtype
    if dtype not in FORMS or parts["biases"].dtype is not dtype or group % (2 * LANES):
        return None
    if not len(codes) * 8 // bits // group * dtype.itemsize == len(scales) == len(biases):
        return None
    return Decoding(_DECODERS[bits], (codes, scales, biases, FORMS[dtype], group), weight.numel // group, group)


@looked_up
def _weights(codes: Any, mask: int, scale: Any, bias: Any) -> Any:
    return i32_to_f32(codes & mask) * scale + bias


@inline
def _load(codes: Bytes, i: int, bits: int) -> Any:
    """Codes ``[i, i + 32)``."""
    if bits == 2:
        return splat(load_u32(codes, i >> 2)) >> ramp(2, 16), splat(load_u32(codes, (i >> 2) + 4)) >> ramp(2, 16)
    at = 4 * bits * (i >> 5)
    if bits == 3:
        return load_codes_3(codes, at)
    if bits == 4:
        return load_codes_4(codes, at)
    return load_codes_6(codes, at) if bits == 6 else (load_u8(codes, at), load_u8(codes, at + LANES))


@inline
def _afq(parts, bits, out, form, lo, hi):
    codes, scales, biases, kind, size = parts
    mask = (1 << bits) - 1
    strip_scales, strip_biases = scratch(STRIP, np.float32), scratch(STRIP, np.float32)
    for begin in range(lo, hi, STRIP):
        count = min(STRIP, hi - begin)
        # If both are multiples of 2**-126, the weights are.
        certain = unfold(strip_scales, scales, kind, begin, count, np.float32(2.0**-103))
        certain &= unfold(strip_biases, biases, kind, begin, count, np.float32(2.0**-103))
        to = without_subnormals(form, certain)
        for group in range(count):
            scale, bias = strip_scales[group], strip_biases[group]
            for i in range((begin + group) * size, (begin + group + 1) * size, 2 * LANES):
                read_ahead(codes, i * bits >> 3)
                a, b = _load(codes, i, bits)
                if bits <= 4:
                    x, y = _weights(a, mask, scale, bias), _weights(b, mask, scale, bias)
                else:
                    x, y = i32_to_f32(a & mask) * scale + bias, i32_to_f32(b & mask) * scale + bias
                put_pair(out, i, to, x, y)


@Decoder
def _afq2(parts, out, form, lo, hi):
    _afq(parts, 2, out, form, lo, hi)


@Decoder
def _afq3(parts, out, form, lo, hi):
    _afq(parts, 3, out, form, lo, hi)


@Decoder
def _afq4(parts, out, form, lo, hi):
    _afq(parts, 4, out, form, lo, hi)


@Decoder
def _afq6(parts, out, form, lo, hi):
    _afq(parts, 6, out, form, lo, hi)


@Decoder
def _afq8(parts, out, form, lo, hi):
    _afq(parts, 8, out, form, lo, hi)


@inline
def _of_group(strip, part, log2):
    """The number of the group of codes ``[32 part, 32 part + 32)``; unsigned, an index does not count from the end."""
    return strip[np.uint64(part >> log2)]


@inline
def _row(parts, bits, x, lo, hi):
    """16 words of eight codes, or of four, at a time."""
    codes, scales, biases, kind, size = parts
    step, log2, mask = 64 if bits == 6 else 128, size >> 6, (1 << bits) - 1
    a = b = splat(np.float32(0))
    strip_scales, strip_biases = scratch(STRIP, np.float32), scratch(STRIP, np.float32)
    for begin in range(lo, hi, STRIP):
        count, before = min(STRIP, hi - begin), (begin - lo) * size
        unfold(strip_scales, scales, kind, begin, count, np.float32(0))
        unfold(strip_biases, biases, kind, begin, count, np.float32(0))
        for i in range(before, before + count * size, step):
            start = min(i - before, count * size - step)
            at, part = (begin * size + start) * bits >> 3, start >> 5
            read_ahead(codes, at)
            words = load_i32(codes, at) if bits == 4 else load_u24(codes, at)
            scale_0, scale_1 = _of_group(strip_scales, part, log2), _of_group(strip_scales, part + 1, log2)
            bias_0, bias_1 = _of_group(strip_biases, part, log2), _of_group(strip_biases, part + 1, log2)
            if bits == 6:
                scale, bias = halves(scale_0, scale_1), halves(bias_0, bias_1)
                a, b = weigh_four_rounded(words, bits, mask, scale, bias, x, i, a, b)
            else:
                scale_2, scale_3 = _of_group(strip_scales, part + 2, log2), _of_group(strip_scales, part + 3, log2)
                bias_2, bias_3 = _of_group(strip_biases, part + 2, log2), _of_group(strip_biases, part + 3, log2)
                scale, bias = quarters(scale_0, scale_1, scale_2, scale_3), quarters(bias_0, bias_1, bias_2, bias_3)
                a, b = weigh_four_rounded(words, bits, mask, scale, bias, x, i, a, b)
                in_order()
                words = load_i32(codes, at) if bits == 4 else load_u24(codes, at)
                a, b = weigh_four_rounded(words >> 4 * bits, bits, mask, scale, bias, x, i + 64, a, b)
            in_order()
    return total(a + b)


EIGHT = np.arange(128).reshape(LANES, 8).T.reshape(-1)
"""The order in which the codes of 16 words of eight are taken; of four, it is that of bytes."""

# 2 and 8 bits take as long by :meth:`Decoder.multiply`.


@_afq3.by_row(EIGHT)
def _afq3_row(parts, x, lo, hi):
    return _row(parts, 3, x, lo, hi)


@_afq4.by_row(EIGHT)
def _afq4_row(parts, x, lo, hi):
    return _row(parts, 4, x, lo, hi)


@_afq6.by_row(BYTES)
def _afq6_row(parts, x, lo, hi):
    return _row(parts, 6, x, lo, hi)


_DECODERS = {2: _afq2, 3: _afq3, 4: _afq4, 6: _afq6, 8: _afq8}


F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]

FLAT = np.float32(1e-12)
LARGEST = np.float32(np.finfo(np.float32).max)
LARGEST_GROUP = 128

GRAIN = 4096
"""Groups of a range at least."""


def quantize(w: F32, bits: int, group_size: int, threads: int | None = None) -> tuple[U8, F32, F32]:
    """See :func:`uqff.families.afq.reference.quantize`; ``w`` must be C-contiguous."""
    flat = w.reshape(-1)
    groups = flat.size // group_size
    packed = np.empty(flat.size * bits // 8, np.uint8)
    scales, biases = np.empty((2, groups), np.float32)
    kernel = quantize_groups(bits, group_size)
    run_ranges(lambda lo, hi: kernel(flat, packed, scales, biases, lo, hi), groups, grain=GRAIN, threads=threads)
    grouped = (*w.shape[:-1], w.shape[-1] // group_size)
    return packed.reshape(*w.shape[:-1], -1), scales.reshape(grouped), biases.reshape(grouped)


@cache
def quantize_groups(bits: int, group_size: int) -> Any:
    """The kernel of one type, over groups [lo, hi) of the flattened weight; sizes are compiled in."""
    top = np.float32(2**bits - 1)
    top_code = np.int32(2**bits - 1)
    eights = group_size // 8
    group_bytes = group_size * bits // 8
    # Codes leave in words of as many bits as eight of them have, or, where no word is so wide (3 and 6 bits), 32 codes
    # in three words of a third more.
    word = np.dtype({2: np.uint16, 3: np.uint32, 4: np.uint32, 6: np.uint64, 8: np.uint64}[bits])
    words = group_bytes // word.itemsize
    crossing = bits in (3, 6)
    width = np.uint64(8 * bits)
    third = np.uint64(8 * bits // 3)

    @kernel
    def compiled(w, packed, scales, biases, lo, hi):
        codes = scratch(LARGEST_GROUP, np.uint8)
        codes8 = codes.view(np.uint64)
        out = packed.view(word)
        for g in range(lo, hi):
            group = w[g * group_size : (g + 1) * group_size]
            # Integers in the order of the floats: their minimum and maximum vectorise, those of floats do not.
            low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
            for i in range(group_size):
                key = np.int32(bits_of(group[i]))
                key ^= (key >> np.int32(31)) & np.int32(0x7FFFFFFF)
                low, high = min(low, key), max(high, key)
            bias = float_of(np.uint32(low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF)))) + np.float32(0)
            span = float_of(np.uint32(high ^ ((high >> np.int32(31)) & np.int32(0x7FFFFFFF)))) - bias
            scale = np.float32(1) if span < FLAT else span / top
            scales[g] = scale
            biases[g] = bias
            if span <= LARGEST:
                for i in range(group_size):
                    codes[i] = min(half_away((group[i] - bias) / scale), top_code)
            else:
                codes[:] = 0
            run = out[g * words : (g + 1) * words]
            if crossing:
                for k in range(eights // 4):
                    a, b = pack8(codes8[4 * k], bits), pack8(codes8[4 * k + 1], bits)
                    c, d = pack8(codes8[4 * k + 2], bits), pack8(codes8[4 * k + 3], bits)
                    run[3 * k] = a | (b << width)
                    run[3 * k + 1] = (b >> third) | (c << (width - third))
                    run[3 * k + 2] = (c >> (third + third)) | (d << third)
            else:
                for k in range(eights):
                    run[k] = pack8(codes8[k], bits)

    return compiled


def search(w: F32, importance: F32, bits: int, form: int) -> tuple[U8, F32, F32]:
    """See :func:`uqff.families.afq.reference.search`; both arrays must be C-contiguous."""
    groups, size = w.shape
    scales, biases = np.empty((2, groups), np.float32)
    codes = np.empty((groups, size), np.uint8)
    starts, top = reference.STARTS[bits], float(2**bits - 1)
    run_ranges(
        lambda lo, hi: affine_blocks(w, importance, top, starts, form, scales, biases, codes, lo, hi), groups, grain=256
    )
    packed = np.empty((groups, size * bits // 8), np.uint8)
    pack_rows(codes.view(np.uint64), bits, packed, 0, groups)
    return packed, scales[:, None], biases[:, None]


@kernel
def pack_rows(codes8, bits, packed, lo, hi):
    """Rows [lo, hi) of codes, eight in a uint64, as bit streams."""
    for row in range(lo, hi):
        for k in range(codes8.shape[1]):
            word = pack8(codes8[row, k], bits)
            for i in range(bits):
                packed[row, k * bits + i] = np.uint8(word >> np.uint64(8 * i) & np.uint64(0xFF))
