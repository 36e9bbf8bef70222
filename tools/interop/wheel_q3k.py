"""Q3K as the 0.6.0 wheel of mistralrs writes it: for checking that wheel, never for writing files.

The engine's source takes as super-scale the sub-block scale of largest magnitude, and so do the 0.9.5 wheel and this
package. The 0.6.0 wheel compares the magnitude of scale 1 with scale 0 itself, as if the first `abs` were compiled
away; later comparisons are right. A negative scale 0 therefore never becomes the super-scale, unless scale 1 is NaN.
With that one change the quantiser gives the wheel's bytes.

The layout is written out here a second time, from the format: `hmask 32 | qs 64 | scales 12 | d f16`. The search for
the scale of a sub-block is not touched by the defect and taken from the package.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from uqff.families.gguf.search import largest_magnitude, nearest_int, search_q3_scale, widened_f16

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SUB_BLOCKS = 16
SUB_BLOCK = 16


def quantize_q3k(x: Float32, *, first_without_abs: bool = True) -> Bytes:
    """Blocks float32 `[n, 256]` -> `uint8 [n, 110]`.

    `first_without_abs` is the wheel's defect; without it the bytes are those of the engine's source.
    """
    with np.errstate(all="ignore"):
        scales = search_q3_scale(np.ascontiguousarray(x.reshape(-1, SUB_BLOCK).T)).reshape(-1, SUB_BLOCKS)
        candidates: Float32 = scales.copy()
        if first_without_abs:
            candidates[:, 0] = np.where(np.abs(scales[:, 1]) > scales[:, 0], np.float32(0), scales[:, 0])
        largest = largest_magnitude(candidates.T)[:, None]
        empty = largest == 0
        iscale = np.float32(-32) / largest
        d = np.where(empty, np.float32(0), np.float32(1) / iscale)
        six_bit = np.where(empty, 0, np.clip(nearest_int(iscale * scales), -32, 31) + 32)
        steps: Float32 = np.where(empty, np.float32(0), widened_f16(d) * (six_bit - 32).astype(np.float32))[:, :, None]
        elements = x.reshape(-1, SUB_BLOCKS, SUB_BLOCK)
        codes = np.where(steps != 0, np.clip(nearest_int(elements / steps), -4, 3) + 4, 0).astype(np.uint8)
        return np.concatenate([*_pack(codes.reshape(-1, 256), six_bit.astype(np.uint8)), _f16(d)], axis=1)


def _pack(codes: Bytes, scales: Bytes) -> tuple[Bytes, Bytes, Bytes]:
    """Codes `[n, 256]` of 3 bits and scales `[n, 16]` of 6 bits -> hmask, qs, scales."""
    hmask = np.packbits(codes.reshape(-1, 8, 32) >> 2, axis=1, bitorder="little").reshape(-1, 32)
    two_bits = codes.reshape(-1, 2, 4, 32) & 3
    qs = (two_bits << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(axis=2, dtype=np.uint8).reshape(-1, 64)
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    high = ((scales >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(axis=1, dtype=np.uint8)
    return hmask, qs, np.concatenate([low, high], axis=1)


def _f16(d: Float32) -> Bytes:
    return d.astype("<f2").view(np.uint8)
