"""Plain numbers of one width as those of another: kernels for float32, float16 and bfloat16.

The items are numbers; the last 32 of a range overlap the ones before.
"""

from __future__ import annotations

from typing import Any

from uqff.codes import DType
from uqff.simd.compiling import kernel
from uqff.simd.decoding import WIDTH, Decoder, Decoding
from uqff.simd.load_store import load_i32, load_u16
from uqff.simd.output import (
    Bytes,
    Kernel,
    f16_lanes,
    f32_lanes,
    over,
    put,
    put_pair,
    reach,
    read_ahead,
    without_subnormals,
    write_ahead,
)
from uqff.simd.vectors import LANES, as_f32

__all__ = ["KERNELS", "cast", "numbers"]


def cast(data: Bytes, dtype: DType, out: Bytes, form: int) -> bool:
    """Write numbers in another dtype, rounded to the nearest, ties to even; what a NaN carries is lost.

    Args:
        data: the bytes of the numbers.
        dtype: what they are.
        out: the bytes of as many numbers.
        form: of those, one of :data:`uqff.simd.output.FORMS`.

    Returns:
        Whether it was done; if not (another dtype, fewer numbers than are written together), nothing was written.
    """
    kernel, count = KERNELS.get(dtype), len(data) // max(dtype.itemsize, 1)
    if kernel is None or count < WIDTH:
        return False
    over(count, 1, lambda lo, hi: kernel(data, out, form, lo, hi))
    return True


@kernel
def _f32(data: Bytes, out: Bytes, form: int, lo: int, hi: int) -> None:
    for start in range(lo, hi, WIDTH):
        at = min(start, hi - WIDTH)
        read_ahead(data, 4 * at)
        read_ahead(data, 4 * (at + LANES))
        x, y = f32_lanes(load_i32(data, 4 * at)), f32_lanes(load_i32(data, 4 * (at + LANES)))
        put_pair(out, at, form, x, y)


@kernel
def _f16(data: Bytes, out: Bytes, form: int, lo: int, hi: int) -> None:
    form = without_subnormals(form, True)
    for start in range(lo, hi, WIDTH):
        at = min(start, hi - WIDTH)
        read_ahead(data, 2 * at)
        x, y = f16_lanes(load_u16(data, 2 * at)), f16_lanes(load_u16(data, 2 * (at + LANES)))
        put_pair(out, at, form, x, y)


@kernel
def _bf16(data: Bytes, out: Bytes, form: int, lo: int, hi: int) -> None:
    for start in range(lo, hi, WIDTH):
        at = min(start, hi - WIDTH)
        read_ahead(data, 2 * at)
        write_ahead(out, at, form, reach(form))
        # By 16: what put() does to a bfloat16 that becomes one again, LLVM then sees to be nothing.
        put(out, at, form, f32_lanes(load_u16(data, 2 * at) << 16))
        put(out, at + LANES, form, f32_lanes(load_u16(data, 2 * (at + LANES)) << 16))


KERNELS: dict[DType, Kernel] = {DType.F32: _f32, DType.F16: _f16, DType.BF16: _bf16}
"""By the dtype of the numbers that come in."""


def numbers(data: Bytes, dtype: DType) -> Decoding | None:
    """How plain numbers are decoded by kernels that multiply; None if there are none for the dtype."""
    decoder = _DECODERS.get(dtype)
    return None if decoder is None else Decoding(decoder, (data,), len(data) // dtype.itemsize, 1)


@Decoder
def _f32_numbers(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    for start in range(lo, hi, WIDTH):
        at = min(start, hi - WIDTH)
        read_ahead(data, 4 * at)
        read_ahead(data, 4 * (at + LANES))
        put_pair(out, at, form, as_f32(load_i32(data, 4 * at)), as_f32(load_i32(data, 4 * (at + LANES))))


@Decoder
def _f16_numbers(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    for start in range(lo, hi, WIDTH):
        at = min(start, hi - WIDTH)
        read_ahead(data, 2 * at)
        put_pair(out, at, form, f16_lanes(load_u16(data, 2 * at)), f16_lanes(load_u16(data, 2 * (at + LANES))))


@Decoder
def _bf16_numbers(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    for start in range(lo, hi, WIDTH):
        at = min(start, hi - WIDTH)
        read_ahead(data, 2 * at)
        x, y = as_f32(load_u16(data, 2 * at) << 16), as_f32(load_u16(data, 2 * (at + LANES)) << 16)
        put_pair(out, at, form, x, y)


_DECODERS: dict[DType, Decoder] = {DType.F32: _f32_numbers, DType.F16: _f16_numbers, DType.BF16: _bf16_numbers}
"""Without regard to what NaNs carry, of which sums keep nothing."""
