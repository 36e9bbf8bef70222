"""F8Q8 on the CPU: bit-equal twins of :mod:`uqff.families.f8q8.reference`. The items are blocks."""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.f8q8.reference import BLOCK_SIZE, STARTS, assemble
from uqff.families.f8q8.tensor import BLOCK
from uqff.numerics.fitting import E4M3
from uqff.numerics.packing import E4M3_MAX, e4m3_to_float32
from uqff.simd.arithmetic import half_away, signed_code
from uqff.simd.bits import MAGNITUDE, bits_of, copy32, e4m3_code, float_of
from uqff.simd.compiling import kernel
from uqff.simd.decoding import Decoder, Decoding
from uqff.simd.fitting import scaled_blocks
from uqff.simd.load_store import load_bytes
from uqff.simd.output import F32, Bytes, put_pair, read_ahead, without_subnormals
from uqff.simd.planes import BYTES, byte_planes, load_pieces
from uqff.simd.scratch import scratch
from uqff.simd.threads import run_ranges
from uqff.simd.vectors import halves, hi_i8_to_f32, lo_i8_to_f32, multiply_add, splat, total

if TYPE_CHECKING:
    from uqff.families.f8q8.tensor import F8Q8

__all__ = ["decoding", "dequantize", "quantize", "search"]

SIZE = BLOCK.fixed_size
D, QS = BLOCK.offsets

SCALES = e4m3_to_float32(np.arange(256, dtype=np.uint8)) / E4M3_MAX
"""Of each stored byte."""


def dequantize(weight: F8Q8, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    whole, rest = decoding(weight), weight.numel % BLOCK_SIZE
    if whole is None:
        return False
    whole.dequantize(out, form)
    if rest:
        size = 4 if form == F32 else 2
        last = np.empty(BLOCK_SIZE * size, np.uint8)
        (blocks,) = whole.parts
        whole.decoder.dequantize((blocks[SIZE * whole.items :],), last, form, 0, 1)
        out[BLOCK_SIZE * size * whole.items :] = last[: size * rest]
    return True


def decoding(weight: F8Q8) -> Decoding | None:
    """See :meth:`QuantizedTensor.decoding`; of the blocks that are full."""
    blocks, numel = weight.parts["blocks"].array(), weight.numel
    fits = len(blocks) >= SIZE * -(-numel // BLOCK_SIZE)
    return Decoding(_f8q8, (blocks,), numel // BLOCK_SIZE, BLOCK_SIZE) if fits else None


@Decoder
def _f8q8(parts, out, form, lo, hi):
    (blocks,) = parts
    # A scale is at least 2**-18, and the codes are integers.
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at = SIZE * block
        read_ahead(blocks, at)
        d = SCALES[blocks[at + D]]
        codes = load_bytes(blocks, at + QS)
        put_pair(out, BLOCK_SIZE * block, form, lo_i8_to_f32(codes) * d, hi_i8_to_f32(codes) * d)


@_f8q8.by_row(BYTES)
def _f8q8_row(parts, x, lo, hi):
    (blocks,) = parts
    sums = splat(np.float32(0))
    for i in range(0, BLOCK_SIZE * (hi - lo), 2 * BLOCK_SIZE):
        at = SIZE * min(lo + i // BLOCK_SIZE, hi - 2)
        read_ahead(blocks, at)
        scales = halves(SCALES[blocks[at + D]], SCALES[blocks[at + SIZE + D]])
        sums = multiply_add(byte_planes(load_pieces(blocks, at + QS, SIZE, 2), x, i), scales, sums)
    return total(sums) * np.float32(2.0**-24)


Numbers: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]

PAIR = 2 * BLOCK_SIZE
"""Blocks are taken in pairs: a loop over 64 elements vectorises, one over 32 is unrolled into scalar code instead."""

LARGEST = np.float32(np.finfo(np.float32).max)

GRAIN = 4096
"""Pairs of a range at least."""


def quantize(w: Numbers, threads: int | None = None) -> U8:
    """See :func:`uqff.families.f8q8.reference.quantize`; ``w`` must be C-contiguous."""
    flat = w.reshape(-1)
    blocks = -(-flat.size // BLOCK_SIZE)
    pairs, rest = divmod(flat.size, PAIR)
    out = np.empty((blocks, SIZE), np.uint8)
    run_ranges(lambda lo, hi: quantize_pairs(flat, out, lo, hi), pairs, grain=GRAIN, threads=threads)
    if rest:
        last, last_out = np.zeros(PAIR, np.float32), np.empty((2, SIZE), np.uint8)
        last[:rest] = flat[pairs * PAIR :]
        quantize_pairs(last, last_out, 0, 1)
        out[2 * pairs :] = last_out[: blocks - 2 * pairs]
    return out


@kernel
def quantize_pairs(w, out, lo, hi):
    """Pairs of blocks [lo, hi) of the flattened weight."""
    codes = scratch(PAIR, np.uint8)
    for p in range(lo, hi):
        pair = w[p * PAIR : (p + 1) * PAIR]
        first, second = np.uint32(0), np.uint32(0)
        for i in range(PAIR):
            magnitude = bits_of(pair[i]) & MAGNITUDE
            first = max(first, magnitude if i < BLOCK_SIZE else np.uint32(0))
            second = max(second, magnitude if i >= BLOCK_SIZE else np.uint32(0))
        d0, d1 = float_of(first) / np.float32(127), float_of(second) / np.float32(127)
        inverse0 = np.float32(0) if d0 == np.float32(0) else np.float32(1) / d0
        inverse1 = np.float32(0) if d1 == np.float32(0) else np.float32(1) / d1
        if max(inverse0, inverse1) <= LARGEST:
            for i in range(PAIR):
                codes[i] = np.uint8(half_away(pair[i] * (inverse0 if i < BLOCK_SIZE else inverse1)))
        else:
            for i in range(PAIR):
                # 1 / d is infinite (d subnormal): infinity saturates, and 0 * inf, a NaN, gives 0
                product = pair[i] * (inverse0 if i < BLOCK_SIZE else inverse1)
                codes[i] = np.uint8(np.int32(signed_code(product, np.float32(-128), np.float32(127))))
        out[2 * p, 0] = np.uint8(e4m3_code(bits_of(d0 * E4M3_MAX)))
        out[2 * p + 1, 0] = np.uint8(e4m3_code(bits_of(d1 * E4M3_MAX)))
        copy32(out[2 * p], 1, codes, 0)
        copy32(out[2 * p + 1], 1, codes, BLOCK_SIZE)


def search(w: Numbers, importance: Numbers) -> U8:
    """See :func:`uqff.families.f8q8.reference.search`; both arrays must be C-contiguous."""
    d, codes = np.empty(len(w), np.float32), np.empty(w.shape, np.int8)
    run_ranges(
        lambda lo, hi: scaled_blocks(w, importance, -128.0, 127.0, STARTS, E4M3, d, codes, lo, hi), len(w), grain=256
    )
    return assemble(d, codes)
