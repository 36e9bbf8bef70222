"""Blocks of the ggml types with other codes and the same scales."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.gguf.blocks import BlockType
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

__all__ = ["code_range", "with_codes"]

I32: TypeAlias = npt.NDArray[np.int32]
U8: TypeAlias = npt.NDArray[np.uint8]


def code_range(name: str) -> tuple[int, int] | None:
    """The least and the largest number that codes of a type stand for; None if it has none."""
    if name in SCALED:
        return SCALED[name].low, SCALED[name].high
    if name in K_SCALED:
        return K_SCALED[name].low, K_SCALED[name].high
    if name in AFFINE:
        return 0, AFFINE[name].top
    return (0, K_AFFINE[name].top) if name in K_AFFINE else None


def with_codes(block_type: BlockType, blocks: U8, q: I32) -> U8:
    """Blocks ``[n, type_size]`` with the codes ``[n, block_size]``, within :func:`code_range`."""
    name, q = block_type.name, np.ascontiguousarray(q.T)
    if name in SCALED or name in AFFINE:
        fields = np.ascontiguousarray(blocks).view(block_type.numpy)[:, 0]
        d = fields["d"].astype(np.float32)
        if name in SCALED:
            return put_scaled(name, d, q + SCALED[name].bias)
        return put_affine(name, d, fields["m"].astype(np.float32), q)
    # Of a K type, codes have bits of their own: all that the largest codes set.
    high = K_AFFINE[name].top if name in K_AFFINE else K_SCALED[name].high
    return blocks & ~_codes_only(name, np.full_like(q[:, :1], high)) | _codes_only(name, q)


def _codes_only(name: str, q: I32) -> U8:
    """Blocks whose scales are zero bits."""
    count = q.shape[1]
    none = np.zeros(count, np.float32)
    if name in K_AFFINE:
        scales = np.zeros((256 // K_AFFINE[name].size, count), np.int32)
        return put_k_affine(name, none, none, scales, scales, q)
    return put_k_scaled(name, none, np.full((16, count), -K_SCALED[name].scale_bias, np.int32), q)
