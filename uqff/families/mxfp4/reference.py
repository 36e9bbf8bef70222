"""MXFP4, slow and obvious: what the kernels are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.numerics.fitting import total

if TYPE_CHECKING:
    import torch

__all__ = [
    "BIAS",
    "BLOCK_SIZE",
    "E2M1",
    "EXPONENTS",
    "THRESHOLDS",
    "dequantize",
    "floor_log2",
    "quantize",
    "scale_bytes",
    "search",
]

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]

BLOCK_SIZE = 32
"""Weights in a block."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each nibble: sign, two exponent bits (bias 1), one mantissa bit (OCP Microscaling Formats v1.0, 5.3.3)."""


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``E2M1[nibble] * float32 with exponent field = scale``; see :class:`uqff.families.mxfp4.tensor.MXFP4`."""
    import torch

    nibbles = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1)
    values = torch.tensor(E2M1, dtype=torch.float32, device=blocks.device)[nibbles.long()]
    powers = (scales.to(torch.int32) << 23).view(torch.float32)
    made = values.reshape(*scales.shape, BLOCK_SIZE) * powers.unsqueeze(-1)
    return made.reshape(*blocks.shape[:-1], 2 * blocks.shape[-1])


THRESHOLDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
"""Code k is taken from ``THRESHOLDS[k - 1]`` on: the midpoints of 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties go up."""

BIAS = 127
"""A scale byte s means 2^(s - 127)."""


def quantize(w: FloatArray) -> tuple[ByteArray, ByteArray]:
    """Quantise along the last dimension.

    Args:
        w: finite float32 ``[..., in]``, ``in`` a multiple of 32.

    Returns:
        Codes uint8 ``[..., in / 2]``, the even element in the low nibble; scale bytes uint8 ``[..., in / 32]``. Bit 3
        of a code is the sign of elements below zero: -0.1 may become code 8, -0.0 becomes 0.
    """
    blocks = w.reshape(*w.shape[:-1], w.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    with np.errstate(all="ignore"):
        scales = scale_bytes(np.abs(blocks).max(-1))
        scaled = blocks * np.ldexp(np.float32(1), BIAS - scales.astype(np.int32))[..., None]
        codes = np.searchsorted(THRESHOLDS, np.abs(scaled), side="right").astype(np.uint8)
        codes |= (scaled < 0).astype(np.uint8) << 3
    codes = codes.reshape(w.shape)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def scale_bytes(absmax: FloatArray) -> ByteArray:
    """``floor(log2f(absmax / 6)) + 127`` within 0..254, and 127 for a block of zeros."""
    exponent = np.maximum(floor_log2(absmax / np.float32(6)), np.float32(-BIAS)).astype(np.int32)
    return np.where(absmax == 0, BIAS, np.clip(exponent + BIAS, 0, 254)).astype(np.uint8)


def floor_log2(x: FloatArray) -> FloatArray:
    """``floor(log2f(x))``, -inf for 0.

    log2f rounds to float32 before the floor. Just below 2^k it rounds up to k, from 1 ulp for k = 3 up to 44 ulps for
    k beyond 64; the result is then one more than the exponent of x. Rounding from float64 takes the same side as
    glibc's log2f for every float32.
    """
    with np.errstate(divide="ignore"):
        return np.floor(np.log2(x.astype(np.float64)).astype(np.float32))


EXPONENTS = (1, 0, -1, -2, -3)
"""What is added to the engine's exponent to try it. It clips what is above 6, up to half of it; the next one clips
nothing, and beyond that every number has a lower exponent, too. Lower ones clip more, for the sake of small weights.
"""


def search(w: FloatArray, importance: FloatArray) -> tuple[ByteArray, ByteArray]:
    """Quantise blocks with the exponent of least weighted squared error; codes as in :func:`quantize`.

    Args:
        w: finite float32 ``[n, 32]``.
        importance: weights of the squared errors, like ``w``.

    Returns:
        Codes uint8 ``[n, 16]``, scale bytes uint8 ``[n, 1]``.
    """
    x, weights = (np.ascontiguousarray(each.T).astype(np.float64) for each in (w, importance))
    with np.errstate(all="ignore"):
        first = scale_bytes(np.abs(w).max(-1)).astype(np.int64)
        best, scales = np.full(len(w), np.inf), first
        codes = np.zeros(x.shape, np.uint8)
        for exponent in EXPONENTS:
            tried = np.clip(first + exponent, 1, 254)
            scaled = np.abs(x) * np.ldexp(1.0, BIAS - tried)
            chosen = np.searchsorted(THRESHOLDS, scaled, side="right").astype(np.uint8)
            error = (scaled - np.array(E2M1)[chosen]) * np.ldexp(1.0, tried - BIAS)
            error = total(weights * error * error)
            better = error < best
            best, scales = np.where(better, error, best), np.where(better, tried, scales)
            codes = np.where(better, chosen, codes)
        codes |= (x < 0).astype(np.uint8) << 3
    return np.ascontiguousarray((codes[0::2] | codes[1::2] << 4).T), scales.astype(np.uint8)[:, None]
