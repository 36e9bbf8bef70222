"""HQQ, slow and obvious: what the kernels are compared with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.numerics import fitting
from uqff.numerics.glibc import expf, logf
from uqff.numerics.packing import pack_planes, round_half_away

if TYPE_CHECKING:
    import torch

__all__ = ["STARTS", "dequantize", "idle", "mean_magnitude", "quantize", "search", "shrink"]

FloatArray: TypeAlias = npt.NDArray[np.float32]


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """``(q - zero) * scale``: the codes of M, uint8 ``[rows, columns]``, to float32."""
    import torch

    return (codes.to(torch.float32) - zeros.to(torch.float32)) * scales.to(torch.float32)


LP_NORM = 0.7
BETA = 10.0
KAPPA = 1.01
FIRST_ERROR = np.float32(1e4)
LARGEST_SCALE = np.float32(2e4)

SUMS = 32
"""Running sums of candle's AVX2 sum."""

EXPONENT = np.float32(LP_NORM) - np.float32(1)
"""The exponent of the shrinkage, -0.3, as float32 arithmetic has it."""


def quantize(
    w: FloatArray, bits: int, group_size: int = 64, steps: int = 10
) -> tuple[npt.NDArray[Any], FloatArray, FloatArray]:
    """Quantise along axis 0 of the weight seen as ``[group_size, N]``: element ``i * N + j`` belongs to group j.

    Args:
        w: finite float32 of any shape whose size is a multiple of ``group_size``, taken in C order.
        bits: 8, 4, 3, 2 or 1; the engine writes 4 and 8.
        group_size: elements of a group; the engine writes 64.
        steps: turns of the optimiser at most, at least 1; the engine takes 10.

    Returns:
        Codes packed by :func:`uqff.numerics.packing.pack_planes` along axis 0; scales and zeros, float32 ``[1, N]``,
        for ``w = (q - zero) * scale``. A group whose range exceeds float32 has an infinite scale.
    """
    top = np.float32(2**bits - 1)
    grid = w.reshape(group_size, -1)
    with np.errstate(all="ignore"):
        low, high = grid.min(0), grid.max(0)
        # While optimising, s multiplies; its inverse is what is stored. A constant group has s = 1/0, clamped.
        s = np.clip(np.float32(1) / (high - low) * top, np.float32(0), LARGEST_SCALE)
        zero = optimize(grid, s, -low * s, top, steps)
        codes = np.nan_to_num(_codes(grid, s, zero, top), nan=0.0).astype(np.uint8)
        return pack_planes(codes, bits), (np.float32(1) / s)[None], zero[None]


def optimize(grid: FloatArray, s: FloatArray, zero: FloatArray, top: np.float32, steps: int) -> FloatArray:
    """Move the zero points for at most ``steps`` turns, as long as the mean absolute error of the tensor falls.

    The zero of the turn that no longer improves is the one that is kept.
    """
    beta, best = BETA, FIRST_ERROR
    for _ in range(steps):
        q = _codes(grid, s, zero, top)
        error = grid - (q - zero) / s
        zero = _column_mean(q - (grid - shrink(error, beta)) * s)
        beta *= KAPPA
        current = mean_magnitude(error)
        if not current < best:
            break
        best = current
    return zero


def shrink(error: FloatArray, beta: float) -> FloatArray:
    """The proximal operator of the l_p norm, p = 0.7: ``sign(e) * relu(|e| - |e|^(p-1) / beta)``.

    The power is ``expf(EXPONENT * logf(|e|))``. Below :func:`idle` the result is 0 whatever the last bits of the power.
    """
    magnitude = np.abs(error)
    active = magnitude > idle(beta)
    result = np.zeros_like(error)
    e = magnitude[active]
    power = expf(EXPONENT * logf(e))
    result[active] = np.sign(error[active]) * np.maximum(e - np.float32(1 / beta) * power, np.float32(0))
    return result


def idle(beta: float) -> np.float32:
    """A magnitude up to which the shrinkage is surely 0: where ``|e|^1.3 = 1 / beta``, less a margin of one percent."""
    magnitude: np.float32 = np.float32(0.99 * math.pow(beta, -1 / (2 - LP_NORM)))
    return magnitude


def mean_magnitude(error: FloatArray) -> np.float32:
    """Mean magnitude of the whole tensor, in float32: candle's sum with AVX2, times the reciprocal of the count.

    32 running sums, element k of the flattened tensor in sum ``k % 32``, as four vectors of eight; then pairs of
    vectors, halves of the vector, pairs of elements. The elements after the last full 32 follow one by one.

    Authority: candle-core ``src/cpu/mod.rs``, ``vec_sum``; ``src/cpu/avx.rs``, ``vec_reduce``.
    """
    flat = np.abs(error).reshape(-1)
    full = len(flat) // SUMS * SUMS
    lanes = np.add.accumulate(np.concatenate([np.zeros(SUMS, np.float32), flat[:full]]).reshape(-1, SUMS), axis=0)[-1]
    return mean_of_lanes(lanes, flat[full:], len(flat))


def mean_of_lanes(lanes: FloatArray, rest: FloatArray, count: int) -> np.float32:
    """The end of :func:`mean_magnitude`: joins the running sums, adds the rest, divides by the count."""
    a, b, c, d = lanes.reshape(4, 8)
    eight = (a + b) + (c + d)
    four = eight[:4] + eight[4:]
    total: np.float32 = (four[0] + four[1]) + (four[2] + four[3])
    for magnitude in rest:
        total = total + magnitude
    mean: np.float32 = total * np.float32(1 / count)
    return mean


def _codes(grid: FloatArray, s: FloatArray, zero: FloatArray, top: np.float32) -> FloatArray:
    codes: FloatArray = np.clip(round_half_away(grid * s + zero), np.float32(0), top)
    return codes


def _column_mean(terms: FloatArray) -> FloatArray:
    """Mean over axis 0, added row after row (``accumulate`` does; ``sum`` adds in pairs)."""
    mean: FloatArray = np.add.accumulate(terms, axis=0)[-1] * np.float32(1 / len(terms)) + np.float32(0)
    return mean


STARTS = {
    bits: fitting.affine_starts(2**bits - 1, most=most, count=count)
    for bits, most, count in ((1, 0.45, 9), (2, 0.34, 8), (3, 0.2, 8), (4, 0.11, 8), (8, 0.006, 5))
}
"""Where the search of each width begins."""


def search(w: FloatArray, importance: FloatArray, bits: int) -> tuple[npt.NDArray[np.uint8], FloatArray, FloatArray]:
    """Groups quantised to the least weighted squared error.

    Args:
        w: finite float32 ``[n, group_size]``.
        importance: weights of the squared errors, like ``w``.
        bits: 8, 4, 3, 2 or 1.

    Returns:
        Codes uint8 ``[n, group_size]``; scales and zeros, float32 ``[n]``, not finite where there is one value only.
    """
    with np.errstate(all="ignore"):
        x, weights = (np.ascontiguousarray(each.T).astype(np.float64) for each in (w, importance))
        scale, offset, codes = fitting.quantize_affine(x, weights, 2**bits - 1, STARTS[bits], fitting.F32)
        return np.ascontiguousarray(codes.T.astype(np.uint8)), scale, -offset / scale
