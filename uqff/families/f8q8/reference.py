"""F8Q8, slow and obvious: what the kernels are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.numerics import fitting
from uqff.numerics.packing import E4M3_MAX, float32_to_e4m3, round_half_away

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCK_SIZE", "STARTS", "assemble", "dequantize", "quantize", "search"]

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]

BLOCK_SIZE = 32
"""Weights in a block."""


def dequantize(blocks: torch.Tensor) -> torch.Tensor:
    """``qs * (float32(d) / 416)``: blocks uint8 ``[n, 33]`` to float32 ``[n, 32]``."""
    import torch

    stored = blocks[:, :1].contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    # Divided by a tensor: by a number, torch on CUDA multiplies with its rounded inverse.
    d = stored / torch.full_like(stored, float(E4M3_MAX))
    return blocks[:, 1:].contiguous().view(torch.int8).to(torch.float32) * d


def quantize(w: FloatArray) -> ByteArray:
    """Quantise the flattened weight; blocks run across rows, the last one is padded with zeros.

    Args:
        w: finite float32, any shape, flattened in C order.

    Returns:
        uint8 ``[ceil(n / 32), 33]``: the scale ``e4m3(d * 416)``, then 32 int8 codes ``round(w / d)``, made with the d
        before its rounding. d is a 127th of the largest magnitude.
    """
    flat = w.reshape(-1)
    blocks = np.concatenate([flat, np.zeros(-len(flat) % BLOCK_SIZE, np.float32)]).reshape(-1, BLOCK_SIZE)
    with np.errstate(all="ignore"):
        d = np.abs(blocks).max(-1, keepdims=True, initial=0) / np.float32(127)
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
        # A subnormal d has an infinite inverse: Rust's casts saturate infinity and turn 0 * inf, a NaN, into 0.
        codes = np.clip(round_half_away(blocks * inverse), np.float32(-128), np.float32(127))
        scale = float32_to_e4m3(d * E4M3_MAX)
    return np.concatenate([scale, np.nan_to_num(codes, nan=0.0).astype(np.int8).view(np.uint8)], axis=-1)


STARTS = fitting.scale_starts(-128, widest=1.004, narrowest=0.97, count=6, signs=(1,))
"""Where the search begins."""


def search(w: FloatArray, importance: FloatArray) -> ByteArray:
    """Quantise blocks to the least weighted squared error, codes made with the d after its rounding.

    Args:
        w: finite float32 ``[n, 32]``.
        importance: weights of the squared errors, like ``w``.
    """
    with np.errstate(all="ignore"):
        x, weights = (np.ascontiguousarray(each.T).astype(np.float64) for each in (w, importance))
        d, codes = fitting.quantize_scaled(x, weights, -128, 127, STARTS, fitting.E4M3)
    return assemble(d, codes.T.astype(np.int8))


def assemble(d: FloatArray, codes: npt.NDArray[np.int8]) -> ByteArray:
    """Blocks of their d, float32 ``[n]``, and codes ``[n, 32]``."""
    scale = float32_to_e4m3(d * E4M3_MAX)[:, None]
    return np.concatenate([scale, np.ascontiguousarray(codes).view(np.uint8)], axis=-1)
