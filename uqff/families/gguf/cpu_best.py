"""The fast twin of :mod:`uqff.families.gguf.reference_best`, equal to it bit for bit."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.gguf import cpu_best_k as kernels
from uqff.families.gguf import reference_best
from uqff.families.gguf.reference_best import (
    AFFINE,
    K_AFFINE,
    K_SCALED,
    SCALED,
    put_affine,
    put_k_affine,
    put_k_scaled,
    put_scaled,
)
from uqff.numerics.fitting import F16
from uqff.simd import fitting
from uqff.simd.threads import run_ranges

__all__ = ["quantize"]

Blocks: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]

GRAIN = 256
"""Blocks of a range at least."""


def quantize(name: str, x: Blocks, w: Blocks) -> U8:
    """See :func:`uqff.families.gguf.reference_best.quantize`; both arrays must be C-contiguous."""
    with np.errstate(all="ignore"):
        return _quantize(name, x, w)


def _quantize(name: str, x: Blocks, w: Blocks) -> U8:
    count, size = x.shape
    if name in SCALED and size <= fitting.MOST:
        scaled = SCALED[name]
        d, codes = np.empty(count, np.float32), np.empty((count, size), np.int8)
        bounds = float(scaled.low), float(scaled.high)
        run_ranges(
            lambda lo, hi: fitting.scaled_blocks(x, w, *bounds, scaled.starts, scaled.form, d, codes, lo, hi),
            count,
            grain=GRAIN,
        )
        return put_scaled(name, d, codes.T + np.int8(scaled.bias))
    if name in AFFINE:
        affine = AFFINE[name]
        d, m = np.empty((2, count), np.float32)
        codes = np.empty((count, size), np.uint8)
        run_ranges(
            lambda lo, hi: fitting.affine_blocks(x, w, float(affine.top), affine.starts, F16, d, m, codes, lo, hi),
            count,
            grain=GRAIN,
        )
        return put_affine(name, d, m, codes.T)
    if name in K_AFFINE:
        return _quantize_k_affine(name, x, w)
    if name in K_SCALED:
        return _quantize_k_scaled(name, x, w)
    return reference_best.quantize(name, x, w)


def _quantize_k_affine(name: str, x: Blocks, w: Blocks) -> U8:
    kind, count = K_AFFINE[name], len(x)
    per_block = 256 // kind.size
    sub_blocks, weights = x.reshape(-1, kind.size), w.reshape(-1, kind.size)
    d, dmin = np.empty((2, count), np.float32)
    ls, lm = np.empty((2, count * per_block), np.uint8)
    codes = np.empty(sub_blocks.shape, np.uint8)
    given = sub_blocks, weights, float(kind.top), float(kind.limit), kind.starts, kind.units
    run_ranges(
        lambda lo, hi: kernels.affine_super_blocks(*given, d, dmin, ls, lm, codes, lo, hi), count, grain=GRAIN // 8
    )
    scales, mins = (each.reshape(count, per_block).T.astype(np.int32) for each in (ls, lm))
    return put_k_affine(name, d, dmin, scales, mins, codes.reshape(count, 256).T)


def _quantize_k_scaled(name: str, x: Blocks, w: Blocks) -> U8:
    kind, count = K_SCALED[name], len(x)
    sub_blocks, weights = x.reshape(-1, 16), w.reshape(-1, 16)
    d, ls = np.empty(count, np.float32), np.empty(16 * count, np.int16)
    codes = np.empty(sub_blocks.shape, np.int8)
    low, high, scale_low, scale_high = map(float, (kind.low, kind.high, kind.scale_low, kind.scale_high))
    given = sub_blocks, weights, low, high, scale_low, scale_high, kind.window, kind.starts, kind.units
    run_ranges(lambda lo, hi: kernels.scaled_super_blocks(*given, d, ls, codes, lo, hi), count, grain=GRAIN // 8)
    scales = ls.reshape(count, 16).T.astype(np.int32)
    return put_k_scaled(name, d, scales, codes.reshape(count, 256).T)
