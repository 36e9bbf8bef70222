"""AFQ, slow and obvious: what the kernels are compared with; :mod:`uqff.families.afq.tensor` draws the packing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.numerics import fitting
from uqff.numerics.packing import float32_to_bf16, float32_to_f16, pack_row, round_half_away

if TYPE_CHECKING:
    import torch

__all__ = ["FLAT", "cast", "dequantize", "quantize", "unpack_stream"]

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]
ScalesDType: TypeAlias = Literal["float32", "float16", "bfloat16"]


def dequantize(
    w_q: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group_size: int
) -> torch.Tensor:
    """``q * scale + bias``, float32 ``[..., in]``; see :class:`uqff.families.afq.tensor.AFQ` for the arguments."""
    import torch

    codes = unpack_stream(w_q, bits).to(torch.float32)
    groups = codes.reshape(*scales.shape, group_size)
    scale, bias = (part.to(torch.float32).unsqueeze(-1) for part in (scales, biases))
    return (groups * scale + bias).reshape(codes.shape)


def unpack_stream(w_q: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of little-endian bit streams, uint8 ``[..., n·bits/8]`` to uint8 ``[..., n]``."""
    import torch

    # A period of lcm(bits, 8) bits is whole codes and whole bytes: b bytes hold 8 codes for odd b, and so on.
    period = {2: 1, 3: 3, 4: 1, 6: 3, 8: 1}[bits]
    chunks = w_q.reshape(*w_q.shape[:-1], -1, period).to(torch.int32)
    word = torch.zeros_like(chunks[..., 0])
    for i in range(period):
        word |= chunks[..., i] << 8 * i
    codes = [word >> bits * j & (1 << bits) - 1 for j in range(8 * period // bits)]
    return torch.stack(codes, dim=-1).to(torch.uint8).reshape(*w_q.shape[:-1], -1)


FLAT = np.float32(1e-12)
"""A group whose range is below this gets scale 1; all its codes are then 0."""


def quantize(w: FloatArray, bits: int, group_size: int) -> tuple[ByteArray, FloatArray, FloatArray]:
    """Quantise along the last dimension.

    Args:
        w: finite float32 ``[..., in]``, ``in`` a multiple of ``group_size``.
        bits: 2, 3, 4, 6 or 8.
        group_size: 32, 64 or 128.

    Returns:
        The packed codes as bytes, uint8 ``[..., in * bits / 8]``; scales and biases, float32
        ``[..., in / group_size]``, to be cast by :func:`cast`. The codes are made with the scale before the cast. A
        zero bias is +0.0 (the engine's depends on its compiler's choice for the minimum of -0.0 and +0.0).
    """
    top = np.float32(2**bits - 1)
    groups = w.reshape(*w.shape[:-1], w.shape[-1] // group_size, group_size)
    with np.errstate(all="ignore"):
        bias = groups.min(-1, keepdims=True) + np.float32(0)
        span = groups.max(-1, keepdims=True) - bias
        scale = np.where(np.abs(span) < FLAT, np.float32(1), span / top)
        codes = np.clip(round_half_away((groups - bias) / scale), np.float32(0), top)
    # inf / inf: a range beyond float32 has an infinite scale. Rust casts NaN to 0.
    packed = pack_row(np.nan_to_num(codes, nan=0.0).astype(np.uint8).reshape(w.shape), bits)
    return packed, scale[..., 0], bias[..., 0]


STARTS = {
    bits: fitting.affine_starts(2**bits - 1, most=most, count=count, apart=apart)
    for bits, most, count, apart in (
        (2, 0.3, 6, 3),
        (3, 0.14, 6, 3),
        (4, 0.06, 5, 3),
        (6, 0.02, 5, 3),
        (8, 0.003, 4, None),
    )
}
"""Where the search of each width begins."""


def search(w: FloatArray, importance: FloatArray, bits: int, form: int) -> tuple[ByteArray, FloatArray, FloatArray]:
    """Quantise groups to the least weighted squared error: what :func:`quantize` returns, the scales rounded already.

    Args:
        w: finite float32 ``[n, group_size]``.
        importance: weights of the squared errors, like ``w``.
        bits: 2, 3, 4, 6 or 8.
        form: how scales and biases are stored, of :mod:`uqff.numerics.fitting`.
    """
    with np.errstate(all="ignore"):
        x, weights = (np.ascontiguousarray(each.T).astype(np.float64) for each in (w, importance))
        scale, bias, codes = fitting.quantize_affine(x, weights, 2**bits - 1, STARTS[bits], form)
    return pack_row(np.ascontiguousarray(codes.T.astype(np.uint8)), bits), scale[:, None], bias[:, None]


def cast(values: FloatArray, dtype: ScalesDType) -> npt.NDArray[Any]:
    """Scales or biases as they are stored, rounded to nearest even: float32 values, or uint16 bit patterns."""
    if dtype == "float16":
        return float32_to_f16(values)
    if dtype == "bfloat16":
        return float32_to_bf16(values)
    return values
