"""Quantisers of the ggml block types: the fast twin of ``reference_quantize``, equal to it bit for bit.

A kernel is ``kernel(x, out, lo, hi)``: it reads the blocks ``lo <= b < hi`` of ``x float32 [n_blocks, block_size]`` and
writes the same rows of ``out uint8 [n_blocks, type_size]``. What the arithmetic means, and where it comes from, is told
in the reference. Here are the types without a search; ``gguf_quantize_k`` has the others.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from uqff.families.gguf.blocks import Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Q8_1, Q8K
from uqff.families.gguf.cpu_dequantize import (
    Q4_0_D,
    Q4_0_QS,
    Q4_1_D,
    Q4_1_M,
    Q4_1_QS,
    Q5_0_D,
    Q5_0_QH,
    Q5_0_QS,
    Q5_1_D,
    Q5_1_M,
    Q5_1_QH,
    Q5_1_QS,
    Q8_0_D,
    Q8_0_QS,
    Q8_1_D,
    Q8_1_QS,
    Q8_1_S,
    Q8K_BSUMS,
    Q8K_D,
    Q8K_QS,
    Q8K_SIZE,
)
from uqff.families.gguf.cpu_quantize_k import q2k, q3k, q4k, q5k, q6k
from uqff.simd.arithmetic import (
    ONE,
    ZERO,
    largest_magnitude,
    minimum_and_maximum,
    put_f16,
    reciprocal,
    signed_code,
    truncated_code,
)
from uqff.simd.bits import f16_bits, f16_value
from uqff.simd.compiling import inline, kernel
from uqff.simd.scratch import scratch
from uqff.simd.threads import run_ranges

if TYPE_CHECKING:
    from collections.abc import Callable

# ---------------------------------------------------------------------------------------------------------------------
# Blocks of 32 with one scale
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def q4_0(x, out, lo, hi):
    for block in range(lo, hi):
        d = largest_magnitude(x, block, 32) / np.float32(-8)
        inverse = reciprocal(d)
        put_f16(out, block, Q4_0_D, f16_bits(d))
        for j in range(16):
            low = truncated_code(x[block, j] * inverse + np.float32(8.5), np.float32(15))
            high = truncated_code(x[block, 16 + j] * inverse + np.float32(8.5), np.float32(15))
            out[block, Q4_0_QS + j] = np.uint8(low | high << np.int32(4))


@kernel
def q4_1(x, out, lo, hi):
    for block in range(lo, hi):
        least, greatest = minimum_and_maximum(x, block, 32)
        d = (greatest - least) / np.float32(15)
        inverse = reciprocal(d)
        put_f16(out, block, Q4_1_D, f16_bits(d))
        put_f16(out, block, Q4_1_M, f16_bits(least))
        for j in range(16):
            low = truncated_code((x[block, j] - least) * inverse + np.float32(0.5), np.float32(15))
            high = truncated_code((x[block, 16 + j] - least) * inverse + np.float32(0.5), np.float32(15))
            out[block, Q4_1_QS + j] = np.uint8(low | high << np.int32(4))


@kernel
def q5_0(x, out, lo, hi):
    codes = scratch(32, np.int32)
    for block in range(lo, hi):
        d = largest_magnitude(x, block, 32) / np.float32(-16)
        inverse = reciprocal(d)
        put_f16(out, block, Q5_0_D, f16_bits(d))
        for j in range(32):
            codes[j] = truncated_code(x[block, j] * inverse + np.float32(16.5), np.float32(31))
        _put_five_bits(codes, out, block, Q5_0_QH, Q5_0_QS)


@kernel
def q5_1(x, out, lo, hi):
    codes = scratch(32, np.int32)
    for block in range(lo, hi):
        least, greatest = minimum_and_maximum(x, block, 32)
        d = (greatest - least) / np.float32(31)
        inverse = reciprocal(d)
        put_f16(out, block, Q5_1_D, f16_bits(d))
        put_f16(out, block, Q5_1_M, f16_bits(least))
        for j in range(32):
            codes[j] = truncated_code((x[block, j] - least) * inverse + np.float32(0.5), np.float32(31))
        _put_five_bits(codes, out, block, Q5_1_QH, Q5_1_QS)


@inline
def codes_of_32(x, block, out, at):
    """The codes of Q8_0 and Q8_1 at a place in a vector of bytes; their scale and their sum."""
    d = abs(largest_magnitude(x, block, 32)) / np.float32(127)
    inverse = reciprocal(d)
    total = np.int32(0)
    for j in range(32):
        code = np.int32(signed_code(x[block, j] * inverse, np.float32(-128), np.float32(127)))
        total += code
        out[at + j] = np.uint8(code & np.int32(0xFF))
    return d, total


@inline
def sum_of_q8_1(d_bits, total):
    """The field ``s``, as bits: the sum of the codes (in f16) times d (in f16)."""
    return f16_bits(f16_value(f16_bits(np.float32(total))) * f16_value(d_bits))


@kernel
def q8_0(x, out, lo, hi):
    for block in range(lo, hi):
        d, _ = codes_of_32(x, block, out[block], Q8_0_QS)
        put_f16(out, block, Q8_0_D, f16_bits(d))


@kernel
def q8_1(x, out, lo, hi):
    for block in range(lo, hi):
        d, total = codes_of_32(x, block, out[block], Q8_1_QS)
        d_bits = f16_bits(d)
        put_f16(out, block, Q8_1_D, d_bits)
        put_f16(out, block, Q8_1_S, sum_of_q8_1(d_bits, total))


@inline
def _put_five_bits(codes, out, block, qh, qs):
    """Four bytes of fifth bits, then the nibbles."""
    fifth = np.int32(0)
    for j in range(32):
        fifth |= codes[j] >> np.int32(4) << np.int32(j)
    for k in range(4):
        out[block, qh + k] = np.uint8(fifth >> np.int32(8 * k) & np.int32(0xFF))
    for j in range(16):
        out[block, qs + j] = np.uint8(codes[j] & np.int32(15) | (codes[16 + j] & np.int32(15)) << np.int32(4))


@inline
def codes_of_16(x, block, first, iscale, of_nan, out, at):
    """Sixteen codes of Q8K at a place in a vector of bytes; their sum."""
    total = np.int32(0)
    for i in range(16):
        v = iscale * x[block, first + i]
        code = np.int32(signed_code(v if v == v else of_nan, np.float32(-128), np.float32(127)))
        total += code
        out[at + i] = np.uint8(code & np.int32(0xFF))
    return total


@kernel
def q8k(x, out, lo, hi, extreme):
    """``extreme`` is -128 or -127."""
    for block in range(lo, hi):
        largest = largest_magnitude(x, block, 256)
        if largest == ZERO:
            for j in range(Q8K_SIZE):
                out[block, j] = np.uint8(0)
            continue
        iscale = np.float32(extreme) / largest
        of_nan = np.float32(127) if extreme == -128 else ZERO
        bits = np.int64(np.float32(ONE / iscale).view(np.int32))
        for k in range(4):
            out[block, Q8K_D + k] = np.uint8(bits >> 8 * k & 0xFF)
        for j in range(16):
            total = codes_of_16(x, block, 16 * j, iscale, of_nan, out[block], Q8K_QS + 16 * j)
            out[block, Q8K_BSUMS + 2 * j] = np.uint8(total & np.int32(0xFF))
            out[block, Q8K_BSUMS + 2 * j + 1] = np.uint8(total >> np.int32(8) & np.int32(0xFF))


GRAIN = 1 << 16
"""Elements of the smallest range worth a thread; whole tiles of every type."""


class _Kernel(NamedTuple):
    run: Callable[..., None]
    block_size: int
    type_size: int


KERNELS: dict[str, _Kernel] = {
    "Q4_0": _Kernel(q4_0, Q4_0.block_size, Q4_0.type_size),
    "Q4_1": _Kernel(q4_1, Q4_1.block_size, Q4_1.type_size),
    "Q5_0": _Kernel(q5_0, Q5_0.block_size, Q5_0.type_size),
    "Q5_1": _Kernel(q5_1, Q5_1.block_size, Q5_1.type_size),
    "Q8_0": _Kernel(q8_0, Q8_0.block_size, Q8_0.type_size),
    "Q8_1": _Kernel(q8_1, Q8_1.block_size, Q8_1.type_size),
    "Q2K": _Kernel(q2k, Q2K.block_size, Q2K.type_size),
    "Q3K": _Kernel(q3k, Q3K.block_size, Q3K.type_size),
    "Q4K": _Kernel(q4k, Q4K.block_size, Q4K.type_size),
    "Q5K": _Kernel(q5k, Q5K.block_size, Q5K.type_size),
    "Q6K": _Kernel(q6k, Q6K.block_size, Q6K.type_size),
    "Q8K": _Kernel(q8k, Q8K.block_size, Q8K.type_size),
}


def quantize(
    name: str,
    x: npt.NDArray[np.float32],
    *,
    extreme: int = -128,
    threads: int | None = None,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """Quantises blocks, on several threads.

    Args:
        name: the type, as in ``KERNELS``.
        x: float32 ``[n_blocks, block_size]``, C order, finite; not modified.
        extreme: for Q8K only, the code of the element of largest magnitude: -128 or -127, see ``quantize_q8k``.
        threads: at most so many; ``num_threads()`` if None.
        out: uint8 ``[n_blocks, type_size]``, C order, to write into; a new array if None.

    Returns:
        ``out``.

    Raises:
        KeyError: no such type.
        ValueError: a wrong dtype, shape or order, or another ``extreme``.
    """
    run, block_size, type_size = KERNELS[name]
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != block_size or not x.flags.c_contiguous:
        raise ValueError(f"{name}: expected float32 [n_blocks, {block_size}] in C order, got {x.dtype} {list(x.shape)}")
    shape = (len(x), type_size)
    target = np.empty(shape, np.uint8) if out is None else out
    if target.dtype != np.uint8 or target.shape != shape or not target.flags.carray:
        found = f"{target.dtype} {list(target.shape)}"
        raise ValueError(f"{name}: expected writeable uint8 {list(shape)} in C order, got {found}")
    if extreme not in (-128, -127):
        raise ValueError(f"the code of the element of largest magnitude: expected -128 or -127, got {extreme}")
    # One compiled version serves read-only and writeable sources: numba tells them apart.
    source = x.view()
    source.flags.writeable = False
    more = (extreme,) if name == "Q8K" else ()
    run_ranges(lambda lo, hi: run(source, target, lo, hi, *more), len(x), grain=GRAIN // block_size, threads=threads)
    return target
