"""FP8 on the CPU: bit-equal twins of :mod:`uqff.families.fp8.reference`.

Dequantising, the items are weights; the last 32 overlap the ones before.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.fp8 import reference
from uqff.families.fp8.reference import quantizing_scale
from uqff.numerics.packing import bf16_to_float32, e4m3_to_float32, float32_to_bf16
from uqff.simd.bits import MAGNITUDE, bf16_bits, bits_of, e4m3_code, float_of
from uqff.simd.compiling import kernel
from uqff.simd.cpu import HAS_HALF
from uqff.simd.decoding import WIDTH, Decoder, Decoding
from uqff.simd.finite import largest_magnitude
from uqff.simd.load_store import load_bytes, load_f32
from uqff.simd.output import Bytes, e4m3_pair, f16_pair, f32, put_pair, read_ahead, without_subnormals, zero_or_from
from uqff.simd.planes import any_byte, halved_signed, larger_bytes, load_pieces
from uqff.simd.threads import run_ranges
from uqff.simd.vectors import multiply_add, splat, total

if TYPE_CHECKING:
    from uqff.families.fp8.tensor import FP8

__all__ = ["decoding", "dequantize", "quantize", "search"]


def dequantize(weight: FP8, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    numbers = decoding(weight)
    if numbers is None:
        return False
    numbers.dequantize(out, form)
    return True


def decoding(weight: FP8) -> Decoding | None:
    """See :meth:`QuantizedTensor.decoding`."""
    codes, scale = weight.parts["weight"].array(), weight.parts["dequant_w_scale"].array()
    fits = weight.numel >= WIDTH and len(scale) == 4
    return Decoding(_fp8, (codes, scale), weight.numel, 1) if fits else None


@Decoder
def _fp8(parts, out, form, lo, hi):
    codes, scale = parts
    d = f32(scale, 0)
    # No e4m3 number but zero is below 2**-9.
    form = without_subnormals(form, zero_or_from(np.float32(2.0**-117), d))
    for start in range(lo, hi, WIDTH):
        at = min(start, hi - WIDTH)
        read_ahead(codes, at)
        x, y = e4m3_pair(load_bytes(codes, at))
        put_pair(out, at, form, x * d, y * d)


def _fp8_row(parts, x, lo, hi):
    """Codes are float16s with a part of the exponent, but for NaN, which is looked for by itself."""
    codes, scale = parts
    a = b = c = d = splat(np.float32(0))
    top = splat(0)
    for i in range(0, hi - lo, 64):
        at = min(lo + i, hi - 64)
        read_ahead(codes, at)
        words = load_pieces(codes, at, 0, 1)
        top = larger_bytes(top, words & 0x7F7F7F7F)
        v, w = f16_pair(halved_signed(words << 8 & 0xFF00FF00) & 0xBFFF)
        a, b = multiply_add(v, load_f32(x, i), a), multiply_add(w, load_f32(x, i + 16), b)
        v, w = f16_pair(halved_signed(words & 0xFF00FF00) & 0xBFFF)
        c, d = multiply_add(v, load_f32(x, i + 32), c), multiply_add(w, load_f32(x, i + 48), d)
    if any_byte(top, 0x7F):
        return np.float32(np.nan)
    return total(a + b + (c + d)) * np.float32(2.0**8) * f32(scale, 0)


if HAS_HALF:
    _fp8.by_row(np.arange(64).reshape(32, 2).T.reshape(-1))(_fp8_row)


F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]

GRAIN = 1 << 18
"""Elements of a range at least."""

INFINITY_BITS = np.uint32(0x7F800000)


def quantize(w: F32, threads: int | None = None) -> tuple[U8, np.float32, np.float32]:
    """See :func:`uqff.families.fp8.reference.quantize`; ``w`` must be C-contiguous."""
    flat = w.reshape(-1)
    largest = np.uint32(largest_magnitude(flat.view(np.uint32), threads)).view(np.float32)
    # Rounding keeps the order, so that the largest bfloat16 is the largest float32 rounded.
    scale = quantizing_scale(bf16_to_float32(float32_to_bf16(largest)))
    codes = np.empty(flat.size, np.uint8)
    run_ranges(lambda lo, hi: quantize_elements(flat, scale, codes, lo, hi), flat.size, grain=GRAIN, threads=threads)
    with np.errstate(divide="ignore"):
        return codes.reshape(w.shape), np.float32(1) / scale, scale


@kernel
def quantize_elements(w, scale, codes, lo, hi):
    """Elements [lo, hi): to bfloat16, times the scale in bfloat16, to e4m3."""
    elements, out = w[lo:hi], codes[lo:hi]
    for i in range(elements.size):
        product = bits_of(float_of(bf16_bits(bits_of(elements[i]))) * scale)
        # 0 * inf is a NaN, which rounding would turn into something else; it must reach the conversion as it is.
        rounded = product if (product & MAGNITUDE) > INFINITY_BITS else bf16_bits(product)
        out[i] = np.uint8(e4m3_code(rounded))


def search(w: F32, importance: F32, engine: tuple[U8, np.float32, np.float32]) -> tuple[U8, np.float32, np.float32]:
    """See :func:`uqff.families.fp8.reference.search`; both arrays must be C-contiguous."""
    return reference.search(w, importance, engine, errors, scaled_codes)


def errors(w: F32, importance: F32, codes: U8, scale: np.float32) -> npt.NDArray[np.float64]:
    """See :func:`uqff.families.fp8.reference.errors`."""
    made = np.empty(len(w))
    rows = len(w) // len(importance)
    run_ranges(lambda lo, hi: row_errors(w, importance, rows, codes, scale, _E4M3, made, lo, hi), len(w))
    return made


def scaled_codes(w: F32, scale: np.float32) -> U8:
    """See :func:`uqff.families.fp8.reference.scaled_codes`."""
    flat, codes = w.reshape(-1), np.empty(w.size, np.uint8)
    run_ranges(lambda lo, hi: nearest_elements(flat, scale, codes, lo, hi), w.size, grain=GRAIN)
    return codes.reshape(w.shape)


_E4M3 = e4m3_to_float32(np.arange(256, dtype=np.uint8))


@kernel
def row_errors(w, importance, rows, codes, scale, values, made, lo, hi):
    """Rows [lo, hi); ``rows`` have one importance."""
    for row in range(lo, hi):
        error = 0.0
        for i in range(w.shape[1]):
            e = np.float64(w[row, i]) - np.float64(np.float32(values[codes[row, i]] * scale))
            error += np.float64(importance[row // rows, i]) * e * e
        made[row] = error


@kernel
def nearest_elements(w, scale, codes, lo, hi):
    """Elements [lo, hi)."""
    for i in range(lo, hi):
        codes[i] = np.uint8(e4m3_code(bits_of(w[i] / scale)))
