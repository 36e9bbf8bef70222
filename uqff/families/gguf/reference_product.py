"""The engine's products with ggml types, in numpy: activations become codes too, and codes are multiplied as integers.

candle (``candle-core/src/quantized/k_quants.rs``, ``vec_dot``) and ggml (``ggml_vec_dot_*``) quantise each row of
activations to blocks of the same size first.  Of two blocks, the products of codes and the small integer scales are
added up as integers, which loses nothing; what blocks give is added up in float32::

    Q4_0 Q5_0 Q8_0    activations Q8_0    sum of d d' (q - offset) q'
    Q4_1 Q5_1         activations Q8_1    sum of d d' q q' + m s'
    Q8_1              activations Q8_1    sum of d d' q q'
    K types           activations Q8K     sum of d d' scale (q - offset) q' - dmin d' minimum bsum'

Quantities with a dash are those of the activations.  The order of the float32 sums is not the engine's, which has
another one on every CPU: eight sums go from block to block, sum l that of codes 4l to 4l + 3 of each 32; what K types
multiply with sums of activations adds groups 2l and 2l + 1 to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from uqff.families.gguf import blocks as ggml
from uqff.families.gguf.reference_dequantize import bit_planes, fifth_bits, nibbles, scales_q3k, scales_q4k
from uqff.families.gguf.reference_quantize import QUANTIZERS

if TYPE_CHECKING:
    import torch

    from uqff.families.gguf.blocks import BlockType

__all__ = ["ACTIVATIONS", "Integers", "activations", "integers", "multiply"]

LANES = 8
"""Sums that go from block to block."""
GROUP = 16
"""Codes that a sum of Q8K is of."""

ACTIVATIONS = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), ggml.Q8_0),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1"), ggml.Q8_1),
    **dict.fromkeys(("Q2K", "Q3K", "Q4K", "Q5K", "Q6K", "Q8K"), ggml.Q8K),
}
"""What activations become beside each type, by its name."""

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


class Integers(NamedTuple):
    """Blocks as integers and the floats that belong to them.

    Attributes:
        d: scale, float32 ``[n]``.
        codes: times their scale: int32 ``[n, block_size]``.
        m: what is multiplied with the sums of the activations, float32 ``[n]``; None if nothing is.
        minimums: small integers beside it, int32 ``[n, block_size / 16]``; of K types only.
        offsets: what codes are too large by, times their scale, likewise; None if by nothing.
    """

    d: F32
    codes: I32
    m: F32 | None = None
    minimums: I32 | None = None
    offsets: I32 | None = None


def _numbers(tensor: torch.Tensor) -> I32:
    return tensor.numpy().astype(np.int32)


def _floats(tensor: torch.Tensor) -> F32:
    numbers: F32 = tensor.numpy().reshape(-1)
    return numbers


def _scaled(codes: I32, scales: I32) -> I32:
    return (codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape)


def _q4_0(blocks: torch.Tensor) -> Integers:
    d, qs = ggml.Q4_0.unpack(blocks)
    return Integers(_floats(d), _numbers(nibbles(qs)) - 8)


def _q4_1(blocks: torch.Tensor) -> Integers:
    d, m, qs = ggml.Q4_1.unpack(blocks)
    return Integers(_floats(d), _numbers(nibbles(qs)), _floats(m))


def _q5_0(blocks: torch.Tensor) -> Integers:
    d, qh, qs = ggml.Q5_0.unpack(blocks)
    return Integers(_floats(d), _numbers(nibbles(qs) | fifth_bits(qh)) - 16)


def _q5_1(blocks: torch.Tensor) -> Integers:
    d, m, qh, qs = ggml.Q5_1.unpack(blocks)
    return Integers(_floats(d), _numbers(nibbles(qs) | fifth_bits(qh)), _floats(m))


def _q8_0(blocks: torch.Tensor) -> Integers:
    d, qs = ggml.Q8_0.unpack(blocks)
    return Integers(_floats(d), _numbers(qs))


def _q8_1(blocks: torch.Tensor) -> Integers:
    d, _, qs = ggml.Q8_1.unpack(blocks)
    return Integers(_floats(d), _numbers(qs))


def _q2k(blocks: torch.Tensor) -> Integers:
    scales, qs, d, dmin = ggml.Q2K.unpack(blocks)
    codes = _scaled(_numbers(bit_planes(qs, 2, 32)), _numbers(scales & 0x0F))
    return Integers(_floats(d), codes, _floats(dmin), _numbers(scales >> 4))


def _q3k(blocks: torch.Tensor) -> Integers:
    hmask, qs, scales, d = ggml.Q3K.unpack(blocks)
    codes, small = _numbers(bit_planes(qs, 2, 32) | bit_planes(hmask, 1, 32) << 2), _numbers(scales_q3k(scales))
    return Integers(_floats(d), _scaled(codes, small), offsets=4 * small)


def _affine(d: torch.Tensor, dmin: torch.Tensor, packed: torch.Tensor, codes: torch.Tensor) -> Integers:
    scales, minimums = (_numbers(each) for each in scales_q4k(packed))
    return Integers(_floats(d), _scaled(_numbers(codes), scales), _floats(dmin), np.repeat(minimums, 2, axis=1))


def _q4k(blocks: torch.Tensor) -> Integers:
    d, dmin, scales, qs = ggml.Q4K.unpack(blocks)
    return _affine(d, dmin, scales, bit_planes(qs, 4, 32))


def _q5k(blocks: torch.Tensor) -> Integers:
    d, dmin, scales, qh, qs = ggml.Q5K.unpack(blocks)
    return _affine(d, dmin, scales, bit_planes(qs, 4, 32) | bit_planes(qh, 1, 32) << 4)


def _q6k(blocks: torch.Tensor) -> Integers:
    ql, qh, scales, d = ggml.Q6K.unpack(blocks)
    codes, small = _numbers(bit_planes(ql, 4, 64) | bit_planes(qh, 2, 32) << 4), _numbers(scales)
    return Integers(_floats(d), _scaled(codes, small), offsets=32 * small)


def _q8k(blocks: torch.Tensor) -> Integers:
    d, qs, _ = ggml.Q8K.unpack(blocks)
    return Integers(_floats(d), _numbers(qs))


INTEGERS: dict[str, Callable[[torch.Tensor], Integers]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q8_1": _q8_1,
    "Q2K": _q2k,
    "Q3K": _q3k,
    "Q4K": _q4k,
    "Q5K": _q5k,
    "Q6K": _q6k,
    "Q8K": _q8k,
}


def integers(blocks: torch.Tensor, block_type: BlockType) -> Integers:
    """What uint8 ``[n, type_size]`` hold."""
    return INTEGERS[block_type.name](blocks)


def activations(x: F32, block_type: BlockType) -> npt.NDArray[np.void]:
    """Rows of activations beside a type as blocks of :data:`ACTIVATIONS`, ``[rows, columns / block_size]``."""
    kind = ACTIVATIONS[block_type.name]
    extreme = (-127,) if kind is ggml.Q8K else ()  # as mistral.rs 0.9 has it
    made = QUANTIZERS[kind.name](np.ascontiguousarray(x).reshape(-1, kind.block_size), *extreme)
    return made.view(kind.numpy).reshape(len(x), -1)


def multiply(x: F32, blocks: torch.Tensor, block_type: BlockType) -> F32:
    """``y = x Wᵀ`` as the engine has it.

    Args:
        x: float32 ``[rows, columns]``.
        blocks: of the weight, uint8 ``[out * columns / block_size, type_size]``.
        block_type: which type.

    Returns:
        float32 ``[rows, out]``; a NaN is 0x7FC00000.
    """
    count = x.shape[1] // block_type.block_size
    d, codes, m, minimums, offsets = integers(blocks, block_type)
    d, codes = d.reshape(-1, count), codes.reshape(-1, count, block_type.block_size)
    floats = None if m is None else m.reshape(d.shape)
    y = np.empty((len(x), len(d)), np.float32)
    with np.errstate(all="ignore"):
        for row, given in zip(y, activations(x, block_type), strict=True):
            products = codes * given["qs"].astype(np.int32)
            lanes = products.reshape(*d.shape, -1, LANES, 4).sum((2, 4), dtype=np.int32)
            if offsets is not None:
                lanes = lanes - _with_sums(offsets.reshape(*d.shape, -1), given)
            least = None if minimums is None else _with_sums(minimums.reshape(*d.shape, -1), given)
            scales = given["d"].astype(np.float32)
            sums, beside = np.zeros((len(d), LANES), np.float32), np.zeros(len(d), np.float32)
            for b in range(count):
                sums = sums + lanes[:, b].astype(np.float32) * (d[:, b] * scales[b])[:, None]
                if floats is not None and least is not None:
                    sums = sums - least[:, b].astype(np.float32) * (floats[:, b] * scales[b])[:, None]
                elif floats is not None:
                    beside = beside + floats[:, b] * given["s"][b].astype(np.float32)
            row[:] = _total(sums) + beside
            row[np.isnan(row)] = np.nan  # whose sign and payload differ between CPUs
    return y


def _with_sums(small: I32, given: npt.NDArray[np.void]) -> I32:
    """Integers ``[out, blocks, 16]`` times the sums of as many groups of activations, two to a lane."""
    products = small * given["bsums"].astype(np.int32)
    lanes: I32 = products.reshape(*small.shape[:2], LANES, 2).sum(3, dtype=np.int32)
    return lanes


def _total(sums: F32) -> F32:
    """Halves are added until one is left."""
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]
