"""Activations as kernels of the engine's products take them, laid out once for all rows of a weight.

Their codes; the scales of their blocks; and beside each block what its type asks for: for Q8_0 the sums of four codes,
times the offset of the weight's codes, eight i32; for Q8_1 the field ``s``, a f32; for Q8K the sums of sixteen codes,
sixteen i16.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from uqff.families.gguf.blocks import QK, QK_K, BlockType
from uqff.families.gguf.cpu_quantize import codes_of_16, codes_of_32, sum_of_q8_1
from uqff.families.gguf.reference_product import ACTIVATIONS
from uqff.simd.arithmetic import BELOW_HALF, ONE, ZERO, largest_magnitude, reciprocal
from uqff.simd.bits import bits_of, f16_bits, f16_value
from uqff.simd.chain import Task
from uqff.simd.compiling import inline, kernel
from uqff.simd.crew import Shared
from uqff.simd.dots import quads, store_sums
from uqff.simd.load_store import load_bytes, load_f32, load_u32, store_u8
from uqff.simd.scratch import scratch
from uqff.simd.vectors import as_f32, as_i32, spread_bits, truncated

__all__ = ["BESIDE", "LaidOut", "laid_out", "lay_out", "rounded"]

F32 = npt.NDArray[np.float32]

INFINITY = np.float32(np.inf)
SIGN, BELOW_HALF_BITS = -(1 << 31), int(BELOW_HALF.view(np.int32))

EXTREME = -127
"""The code of the largest activation of a block of Q8K, as mistral.rs 0.9 has it."""

BESIDE = {"Q8_0": 32, "Q8_1": 4, "Q8K": 32}
"""Bytes that are kept beside a block of activations."""


@inline
def _put_u32(out: Any, at: int, bits: Any) -> None:
    for k in range(4):
        out[at + k] = np.uint8(bits >> np.uint32(8 * k) & np.uint32(0xFF))


@inline
def _put_u16(out: Any, at: int, bits: Any) -> None:
    out[at] = np.uint8(bits & np.int32(0xFF))
    out[at + 1] = np.uint8(bits >> np.int32(8) & np.int32(0xFF))


@inline
def _are_numbers(largest, factor):
    """Whether no activation is infinite or NaN, nor their factor; so no code leaves its range."""
    return abs(largest) < INFINITY and abs(factor) < INFINITY


@inline
def _codes_of_16(x, at, factor, codes):
    """:func:`codes_of_16` of such numbers: rounded half away from zero."""
    v = load_f32(x, at) * factor
    store_u8(codes, at, truncated(v + as_f32((as_i32(v) & SIGN) | BELOW_HALF_BITS)))


@inline
def _codes_of_32(x, block, codes):
    """:func:`codes_of_32`, but for the sum."""
    d = abs(largest_magnitude(x, block, QK)) / np.float32(127)
    inverse = reciprocal(d)
    if not _are_numbers(d, inverse):
        codes_of_32(x, block, codes, QK * block)
    else:
        _codes_of_16(x, QK * block, inverse, codes)
        _codes_of_16(x, QK * block + 16, inverse, codes)
    return d


@inline
def _sums_of_four(codes, at):
    return quads(spread_bits(np.uint32(0xFFFFFFFF), 1), load_bytes(codes, at))


@kernel
def lay_out_q8_0(rows, codes, scales, beside, shift):
    x, codes, scales, beside = rows.reshape(-1, QK), codes.reshape(-1), scales.reshape(-1), beside.reshape(-1)
    for block in range(len(x)):
        scales[block] = f16_value(f16_bits(_codes_of_32(x, block, codes)))
        store_sums(beside, 32 * block, _sums_of_four(codes, QK * block) << shift)


@kernel
def lay_out_q8_1(rows, codes, scales, beside, shift):
    x, codes, scales, beside = rows.reshape(-1, QK), codes.reshape(-1), scales.reshape(-1), beside.reshape(-1)
    sums = scratch(32, np.uint8)
    for block in range(len(x)):
        d_bits, total = f16_bits(_codes_of_32(x, block, codes)), np.int32(0)
        store_sums(sums, 0, _sums_of_four(codes, QK * block))
        for k in range(8):
            total += np.int32(load_u32(sums, 4 * k))
        scales[block] = f16_value(d_bits)
        _put_u32(beside, 4 * block, bits_of(f16_value(sum_of_q8_1(d_bits, total))))


@kernel
def lay_out_q8k(rows, codes, scales, beside, shift):
    x, codes, scales, beside = rows.reshape(-1, QK_K), codes.reshape(-1), scales.reshape(-1), beside.reshape(-1)
    sums = scratch(QK_K, np.uint8)
    for block in range(len(x)):
        largest = largest_magnitude(x, block, QK_K)
        empty = largest == ZERO
        iscale = np.float32(EXTREME) / (ONE if empty else largest)
        scales[block] = ZERO if empty else ONE / iscale
        plain = _are_numbers(largest, iscale)
        for j in range(0, QK_K, 16):
            if plain:
                _codes_of_16(x, QK_K * block + j, iscale, codes)
            else:
                codes_of_16(x, block, j, iscale, ZERO, codes, QK_K * block + j)
        for j in range(0, QK_K, 32):
            store_sums(sums, j, _sums_of_four(codes, QK_K * block + j))
        for j in range(16):
            total = np.int32(0)
            for k in range(4):
                total += np.int32(load_u32(sums, 16 * j + 4 * k))
            _put_u16(beside, 32 * block + 2 * j, total)


LAY_OUT: dict[str, Callable[..., None]] = {"Q8_0": lay_out_q8_0, "Q8_1": lay_out_q8_1, "Q8K": lay_out_q8k}
SHIFTS = {"Q4_0": 3, "Q5_0": 4}
"""By what power of two the sums beside activations are multiplied: the offset of codes of these types."""


def _whole(kernel: Any, name: str) -> Shared:
    """A kernel as a task of a chain, of one item."""

    def whole(rows, codes, scales, beside, shift, lo, hi):
        kernel(rows, codes, scales, beside, shift)

    whole.__qualname__ = f"lay_out.{name}"
    return Shared(whole)


LAY_OUT_TASKS = {name: _whole(kernel, name) for name, kernel in LAY_OUT.items()}


class LaidOut(NamedTuple):
    """Rows of activations: codes, uint8 ``[rows, columns]``; scales, float32; and what is beside them, uint8."""

    codes: npt.NDArray[np.uint8]
    scales: F32
    beside: npt.NDArray[np.uint8]


def _room(rows: int, columns: int, kind: BlockType) -> LaidOut:
    blocks = columns // kind.block_size
    return LaidOut(
        np.empty((rows, columns), np.uint8),
        np.empty((rows, blocks), np.float32),
        np.empty((rows, blocks * BESIDE[kind.name]), np.uint8),
    )


def lay_out(x: F32, block_type: BlockType) -> LaidOut:
    """Rows of activations, float32 ``[rows, columns]`` in C order, as kernels of a type take them."""
    kind, (rows, columns) = ACTIVATIONS[block_type.name], x.shape
    made = _room(rows, columns, kind)
    LAY_OUT[kind.name](x, *made, SHIFTS.get(block_type.name, 0))
    return made


def rounded(x: F32, block_type: BlockType) -> F32:
    """Activations as their codes have them, of the types whose activations are Q8_0 or Q8K."""
    codes, scales, _ = lay_out(x, block_type)
    blocks = codes.view(np.int8).reshape(*scales.shape, -1).astype(np.float32)
    with np.errstate(all="ignore"):
        blocks *= scales[..., None]
    return blocks.reshape(x.shape)


def laid_out(x: F32, block_type: BlockType, laid: dict[Hashable, Task]) -> LaidOut:
    """What the task of ``laid`` makes that lays out ``x`` for a type; it is added if there is none."""
    kind, shift = ACTIVATIONS[block_type.name], SHIFTS.get(block_type.name, 0)
    if (kind.name, shift) not in laid:
        laid[kind.name, shift] = Task(LAY_OUT_TASKS[kind.name], (x, *_room(1, x.shape[1], kind), shift))
    return LaidOut(*laid[kind.name, shift].arguments[1:4])
