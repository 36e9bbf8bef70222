"""Quantisers of the K types with an importance matrix, byte for byte what the engine writes: the reference.

The squared error of every element has a weight: the importance of its input, but for Q6K times
``sqrt(sigma2 + x * x)``, where sigma2 is the mean square of the super-block (of Q2K) or twice that.
Arithmetic is that of :mod:`uqff.families.gguf.reference_quantize`.

Authority: candle-core ``src/quantized/k_quants.rs`` (``from_float_imatrix`` of each block) and
``src/quantized/utils.rs`` (``make_qkx3_quants``, ``make_qp_quants``, ``make_qx_quants``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.gguf import assemble
from uqff.families.gguf.reference_quantize import QK_K, codes_with_min
from uqff.families.gguf.search import (
    largest_magnitude,
    nearest_int,
    search_positive_scale,
    search_weighted_scale,
    search_weighted_scale_and_min,
    widened_f16,
)
from uqff.numerics.fitting import total

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["QUANTIZERS", "WITH_MIN", "weights_of"]

F32: TypeAlias = npt.NDArray[np.float32]
I32: TypeAlias = npt.NDArray[np.int32]
U8: TypeAlias = npt.NDArray[np.uint8]


WITH_MIN: dict[str, tuple[int, int, int, np.float32]] = {
    "Q2K": (16, 3, 15, np.float32(1)),
    "Q4K": (32, 15, 63, np.float32(2)),
    "Q5K": (32, 31, 63, np.float32(2)),
}
"""Elements of a sub-block, largest code, largest of the scales' codes, and what sigma2 is in mean squares."""


def quantize_q2k(x: F32, importance: F32) -> U8:
    """Q2K of blocks float32 ``[n, 256]`` and the importance of their elements."""
    with np.errstate(all="ignore"):
        return assemble.q2k(*_with_min(x, importance, *WITH_MIN["Q2K"]))


def quantize_q4k(x: F32, importance: F32) -> U8:
    """Q4K."""
    with np.errstate(all="ignore"):
        return assemble.q4k(*_with_min(x, importance, *WITH_MIN["Q4K"]))


def quantize_q5k(x: F32, importance: F32) -> U8:
    """Q5K."""
    with np.errstate(all="ignore"):
        return assemble.q5k(*_with_min(x, importance, *WITH_MIN["Q5K"]))


def quantize_q3k(x: F32, importance: F32) -> U8:
    """Q3K; a sub-block whose rounded ``d * scale`` is zero keeps the codes of its search."""
    with np.errstate(all="ignore"):
        elements = assemble.sub_blocks(x, 16)
        weights, sums = weights_of(x, importance, 16, np.float32(2))
        scale, searched = search_weighted_scale(elements, weights, 4)
        d, six_bit = search_weighted_scale(_grouped(scale, 16), sums, 32)
        step = (widened_f16(d) * (six_bit - 32).astype(np.float32)).T.reshape(-1)
        q = np.where(step != 0, np.clip(nearest_int(elements / step), -4, 3) + 4, searched)
        return assemble.q3k(d, six_bit, assemble.whole_blocks(q))


def quantize_q6k(x: F32, importance: F32) -> U8:
    """Q6K; a sub-block whose rounded ``d * scale`` is zero keeps the codes of its search."""
    with np.errstate(all="ignore"):
        elements = assemble.sub_blocks(x, 16)
        scale, searched = search_weighted_scale(elements, assemble.sub_blocks(importance, 16), 32)
        scale = _grouped(scale, 16)
        iscale = np.float32(-128) / largest_magnitude(scale)
        d = np.float32(1) / iscale
        scales = np.minimum(nearest_int(iscale * scale), 127).astype(np.int8)
        step = (widened_f16(d) * scales.astype(np.float32)).T.reshape(-1)
        q = np.where(step == 0, searched, np.clip(nearest_int(elements / step), -32, 31) + 32)
        return assemble.q6k(d, scales, assemble.whole_blocks(q))


def _with_min(
    x: F32, importance: F32, size: int, nmax: int, limit: int, factor: np.float32
) -> tuple[F32, F32, I32, I32, I32]:
    """d, dmin, scales and minimums ``[256 / size, n]``, codes ``[256, n]``."""
    elements, per_block = assemble.sub_blocks(x, size), QK_K // size
    weights, sums = weights_of(x, importance, size, factor)
    scale, minimum = (_grouped(each, per_block) for each in search_weighted_scale_and_min(elements, weights, nmax))
    d, ls = search_positive_scale(scale, sums, limit)
    dmin, lm = search_positive_scale(minimum, sums, limit)
    return d, dmin, ls, lm, codes_with_min(elements, d, ls, dmin, lm, nmax)


def weights_of(x: F32, importance: F32, size: int, factor: np.float32) -> tuple[F32, F32]:
    """Weights of sub-blocks, ``[size, n * per_block]``, and their sums, ``[per_block, n]``."""
    sigma2: F32 = factor * total(np.ascontiguousarray((x * x).T)) / np.float32(QK_K)
    elements = assemble.sub_blocks(x, size)
    spread = np.repeat(sigma2, QK_K // size)
    made: F32 = assemble.sub_blocks(importance, size) * np.sqrt(spread + elements * elements)
    return made, _grouped(total(made), QK_K // size)


def _grouped(values: F32, per_block: int) -> F32:
    grouped: F32 = np.ascontiguousarray(values.reshape(-1, per_block).T)
    return grouped


QUANTIZERS: dict[str, Callable[[F32, F32], U8]] = {
    "Q2K": quantize_q2k,
    "Q3K": quantize_q3k,
    "Q4K": quantize_q4k,
    "Q5K": quantize_q5k,
    "Q6K": quantize_q6k,
}
