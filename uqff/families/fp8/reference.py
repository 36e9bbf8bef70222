"""FP8, slow and obvious: what the kernels are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.numerics.fitting import total
from uqff.numerics.packing import E4M3_MAX, bf16_to_float32, e4m3_to_float32, float32_to_bf16, float32_to_e4m3

if TYPE_CHECKING:
    import torch

__all__ = ["LARGEST", "SCALES", "dequantize", "errors", "quantize", "quantizing_scale", "scaled_codes", "search"]

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]


def dequantize(weight: torch.Tensor, dequant_w_scale: torch.Tensor) -> torch.Tensor:
    """``float32(weight) * dequant_w_scale``."""
    import torch

    return weight.to(torch.float32) * dequant_w_scale


def quantize(w: FloatArray) -> tuple[ByteArray, np.float32, np.float32]:
    """Quantise a whole tensor with one scale.

    Args:
        w: finite float32, any shape, at least one element.

    Returns:
        e4m3 codes, uint8 of the shape of ``w``; the dequantising scale ``1 / s``; the quantising scale s. s is 416 for
        every tensor whose magnitudes are all at most 1. A weight that rounds to infinity in bfloat16 makes s 0, and its
        own code NaN (0xFF).
    """
    with np.errstate(all="ignore"):
        x = _bf16(w)
        scale = quantizing_scale(np.abs(x).max())
        product = _bf16(x * scale)
        codes = np.where(np.isnan(product), np.uint8(0xFF), float32_to_e4m3(product))
        return codes, np.float32(1) / scale, scale


def quantizing_scale(absmax: FloatArray | np.float32) -> np.float32:
    """``416 / absmax`` as the engine takes it: reciprocal, then product, each rounded to bfloat16; at most 416."""
    with np.errstate(all="ignore"):
        inverse = _bf16(np.float32(1) / np.asarray(absmax, np.float32))
        scale: np.float32 = np.minimum(_bf16(inverse * E4M3_MAX), E4M3_MAX)[()]
        return scale


def _bf16(x: FloatArray) -> FloatArray:
    return bf16_to_float32(float32_to_bf16(x))


LARGEST = np.float32(448)
"""The largest e4m3 number."""

SCALES = tuple(2 ** (k / 4) for k in range(4))
"""Dequantising scales that are tried, in units of the least that clips nothing; beyond 2 the mantissas are the same."""


def search(
    w: FloatArray,
    importance: FloatArray,
    engine: tuple[ByteArray, np.float32, np.float32],
    errors: Callable[[FloatArray, FloatArray, ByteArray, np.float32], npt.NDArray[np.float64]],
    scaled: Callable[[FloatArray, np.float32], ByteArray],
) -> tuple[ByteArray, np.float32, np.float32]:
    """Of several scales that of the least weighted squared error over the tensor, or what the engine made.

    Args:
        w: finite float32 ``[rows, in]``.
        importance: weights of the squared errors, float32 ``[1, in]``, or ``[experts, in]`` of as many rows each.
        engine: what :func:`quantize` made.
        errors: :func:`errors`, or its kernel.
        scaled: :func:`scaled_codes`, or its kernel.
    """
    with np.errstate(all="ignore"):
        best, chosen = math.fsum(errors(w, importance, engine[0].reshape(w.shape), engine[1])), engine
        if best == 0:
            return engine
        least = np.abs(w).max() / LARGEST
        for unit in SCALES:
            scale = np.float32(least * np.float32(unit))
            if not 0 < scale < np.inf or not np.isfinite(np.float32(1) / scale):
                continue
            codes = scaled(w, scale)
            error = math.fsum(errors(w, importance, codes, scale))
            if error < best or math.isnan(best):
                best, chosen = error, (codes, scale, np.float32(1) / scale)
        return chosen


def scaled_codes(w: FloatArray, scale: np.float32) -> ByteArray:
    """The e4m3 numbers nearest to ``w / scale``."""
    return float32_to_e4m3(np.divide(w, scale, dtype=np.float32))


def errors(w: FloatArray, importance: FloatArray, codes: ByteArray, scale: np.float32) -> npt.NDArray[np.float64]:
    """The weighted squared error of every row of codes with that scale, float64, in the order of the elements."""
    e = w.T.astype(np.float64) - (e4m3_to_float32(codes) * scale).T
    weights = np.repeat(importance, len(w) // len(importance), axis=0).T.astype(np.float64)
    return total(weights * e * e)
