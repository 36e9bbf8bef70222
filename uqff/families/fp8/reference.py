"""FP8, slow and obvious: what the kernels are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.numerics.packing import E4M3_MAX, bf16_to_float32, float32_to_bf16, float32_to_e4m3

if TYPE_CHECKING:
    import torch

__all__ = ["dequantize", "quantize", "quantizing_scale"]

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
