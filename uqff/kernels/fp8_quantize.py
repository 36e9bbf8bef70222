"""FP8 quantiser, the fast twin of :mod:`uqff.families.fp8`, bit-equal to it."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

from uqff.families.fp8 import quantizing_scale
from uqff.kernels.bits import MAGNITUDE, bf16_bits, bits_of, e4m3_code, float_of
from uqff.kernels.threads import run_ranges
from uqff.packing import bf16_to_float32, float32_to_bf16

__all__ = ["quantize"]

F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]

GRAIN = 1 << 18
"""Elements of a range at least."""

INFINITY_BITS = np.uint32(0x7F800000)


def quantize(w: F32, threads: int | None = None) -> tuple[U8, np.float32, np.float32]:
    """See :func:`uqff.families.fp8.quantize`; ``w`` must be C-contiguous."""
    flat = w.reshape(-1)
    peaks = np.zeros(-(-flat.size // GRAIN), np.uint32)
    run_ranges(lambda lo, hi: peak_magnitudes(flat, peaks, GRAIN, lo, hi), len(peaks), threads=threads)
    # Rounding keeps the order, so that the largest bfloat16 is the largest float32 rounded.
    scale = quantizing_scale(bf16_to_float32(float32_to_bf16(peaks.max().view(np.float32))))
    codes = np.empty(flat.size, np.uint8)
    run_ranges(lambda lo, hi: quantize_elements(flat, scale, codes, lo, hi), flat.size, grain=GRAIN, threads=threads)
    with np.errstate(divide="ignore"):
        return codes.reshape(w.shape), np.float32(1) / scale, scale


@njit(nogil=True, cache=True, error_model="numpy", fastmath=False)
def peak_magnitudes(w, peaks, run, lo, hi):  # type: ignore[no-untyped-def]
    """The bits of the largest magnitude of each run of ``run`` elements, for runs [lo, hi)."""
    for r in range(lo, hi):
        elements = w[r * run : min((r + 1) * run, w.size)]
        peak = np.uint32(0)
        for i in range(elements.size):
            peak = max(peak, bits_of(elements[i]) & MAGNITUDE)
        peaks[r] = peak


@njit(nogil=True, cache=True, error_model="numpy", fastmath=False)
def quantize_elements(w, scale, codes, lo, hi):  # type: ignore[no-untyped-def]
    """Elements [lo, hi): to bfloat16, times the scale in bfloat16, to e4m3."""
    elements, out = w[lo:hi], codes[lo:hi]
    for i in range(elements.size):
        product = bits_of(float_of(bf16_bits(bits_of(elements[i]))) * scale)
        # 0 * inf is a NaN, which rounding would turn into something else; it must reach the conversion as it is.
        rounded = product if (product & MAGNITUDE) > INFINITY_BITS else bf16_bits(product)
        out[i] = np.uint8(e4m3_code(rounded))
