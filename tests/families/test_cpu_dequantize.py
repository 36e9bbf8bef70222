"""The dequantise kernels give the reference's bits: every family, dtype of result and pattern of codes and scales."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.strategies import weights
from uqff import DType, simd
from uqff.errors import ShapeError
from uqff.families import AFQ, F8Q8, FP8, GGUF, HQQ, MXFP4, QuantizedTensor, Unquant
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType
from uqff.numerics.packing import PLANES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (DType.F32, DType.F16, DType.BF16)
BITS_OF = {4: torch.int32, 2: torch.int16}

BITS_16 = np.arange(65536, dtype="<u2")
LOW_HALVES = (0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
ROUNDING = np.concatenate([BITS_16.astype("<u4") << 16 | low for low in LOW_HALVES]).view("<f4")
"""Float32 numbers of every sign, exponent and high mantissa, at, before and after the ties of bfloat16 and float16."""

SCALES = np.array([0.0, -0.0, 1.0, -0.37, 6e-8, 5.96e-8, 6.1e-5, 65504, np.inf, -np.inf, np.nan], np.float32)
"""Zeros, subnormal, small, huge and special scales; all but the subnormals of float16 exact or rounded there."""


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(generator(seed).integers(0, 256, shape, np.uint8))


def assert_same(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    bits = BITS_OF[got.element_size()]
    same = (got.view(bits) == expected.view(bits)) | (got.isnan() & expected.isnan())
    assert same.all(), f"{what}: element {int((~same).flatten().nonzero()[0])} of {same.numel()}"


def check(record: QuantizedTensor, *, may_decline: bool = False) -> None:
    """The kernel's bits are those of the reference, in every dtype, in new memory and in the caller's."""
    reference = record._dequantize()
    for dtype in DTYPES:
        got = record.dequantize_by_kernel(dtype)
        if got is None:
            assert may_decline, f"no kernel for {record}"
            return
        assert_same(got, reference.to(dtype), f"{record} to {dtype}")
    out = torch.full(record.shape, 7, dtype=torch.bfloat16)
    assert record.dequantize_by_kernel(torch.bfloat16, out) is out
    assert_same(out, reference.to(torch.bfloat16), f"{record} into out")


def with_scales(block_type: BlockType, seed: int = 0) -> Iterator[np.ndarray[Any, Any]]:
    """Random codes under each pair of scales, and all codes 0x00, 0x7F, 0x80 and 0xFF."""
    fields = [name for name in block_type.numpy.names or () if block_type.numpy[name].kind == "f"]
    for first in SCALES:
        for second in SCALES[:: 1 if len(fields) > 1 else len(SCALES)]:
            blocks = generator(seed).integers(0, 256, (5, block_type.type_size), np.uint8)
            for fill, block in zip((0x00, 0x7F, 0x80, 0xFF), blocks, strict=False):
                block[:] = fill
            view = blocks.view(block_type.numpy)
            for name, scale in zip(fields, (first, second), strict=False):
                view[name] = scale
            yield blocks


@pytest.mark.parametrize("block_type", BLOCK_TYPES, ids=lambda t: t.name)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_gguf(block_type: BlockType) -> None:
    """Any bytes at all; then zero, subnormal, huge and special scales over constant and random codes."""
    check(GGUF(random_bytes(37, 9 * block_type.type_size), block_type))
    if block_type.block_size > 1:
        check(GGUF(torch.from_numpy(np.concatenate(list(with_scales(block_type)))), block_type))


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_1"])
def test_every_float16_scale(name: str) -> None:
    """The scalar conversion, exhaustively; the other types share it."""
    block_type = next(t for t in BLOCK_TYPES if t.name == name)
    blocks = generator().integers(0, 256, (65536, block_type.type_size), np.uint8)
    blocks[:, :2] = BITS_16.view(np.uint8).reshape(-1, 2)
    check(GGUF(torch.from_numpy(blocks), block_type))


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_every_16_bit_weight(dtype: DType) -> None:
    check(Unquant(torch.from_numpy(BITS_16.view(np.uint8).reshape(64, -1)), dtype))


def test_rounding_to_16_bits() -> None:
    """Ties, carries into the exponent, overflow to infinity, subnormals, signed zeros."""
    check(Unquant(torch.from_numpy(ROUNDING.view(np.uint8).reshape(9, -1)), DType.F32))


def test_a_cpu_without_float16_gets_the_same_bits() -> None:
    """The two conversions by bits, which a CPU with its own does not use."""
    import numba

    from uqff.simd import output as numerics
    from uqff.simd.load_store import load_f32, load_u16, store_f32, store_u16
    from uqff.simd.vectors import LANES

    narrow, widen = numerics._to_f16_by_bits, numerics._f16_by_bits

    def both(numbers: Any, halves: Any, out: Any, back: Any) -> None:
        for i in range(0, len(numbers), LANES):
            store_u16(out, 2 * i, narrow(load_f32(numbers, i)))
        for i in range(0, len(back), LANES):
            store_f32(back, i, widen(load_u16(halves, 2 * i)))

    numbers = ROUNDING.view(np.float32)
    out, back = np.empty(2 * len(numbers), np.uint8), np.empty(65536, np.float32)
    numba.njit(both)(numbers, BITS_16.view(np.uint8), out, back)
    expected = torch.from_numpy(numbers.copy()).to(torch.float16)
    assert_same(torch.from_numpy(out).view(torch.float16), expected, "to float16")
    with np.errstate(invalid="ignore"):  # AArch64 tells of signalling NaN
        assert_same(torch.from_numpy(back), torch.from_numpy(BITS_16.view("<f2").astype(np.float32)), "from float16")


@pytest.mark.parametrize("name", ["f16", "_f16_at_by_bits", "bf16"])
def test_single_narrow_floats_of_all_bits(name: str) -> None:
    """Scales at any address, whichever way the CPU reads them; NaN loses its payload and its sign."""
    import numba

    from uqff.simd import output as numerics

    read = getattr(numerics, name)

    def all_of(data: Any, out: Any) -> None:
        for i in range(len(out)):
            out[i] = read(data, 1 + 2 * i)

    data = np.concatenate([np.zeros(1, np.uint8), BITS_16.astype("<u2").view(np.uint8)])
    out = np.empty(len(BITS_16), np.float32)
    numba.njit(all_of)(data, out)
    with np.errstate(invalid="ignore"):  # AArch64 tells of signalling NaN
        expected = BITS_16.astype("<u4") << 16 if name == "bf16" else BITS_16.view("<f2").astype("<f4").view("<u4")
    nan = (expected & 0x7FFFFFFF) > 0x7F800000
    assert np.array_equal(out.view("<u4"), np.where(nan, 0x7FC00000, expected))


def scales_of(dtype: DType, *shape: int, seed: int) -> torch.Tensor:
    """Half of any bits, a quarter of :data:`SCALES`, a quarter of ordinary size."""
    count = int(np.prod(shape))
    any_bits = random_bytes(count * dtype.itemsize, seed=seed).view(dtype.torch)
    special = torch.from_numpy(np.resize(SCALES, count)).to(dtype.torch)
    usual = torch.from_numpy(generator(seed).standard_normal(count, np.float32)).to(dtype.torch)
    kind = torch.arange(count) % 4
    return torch.where(kind < 2, any_bits, torch.where(kind == 2, special, usual)).reshape(shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_afq(bits: int, group_size: int, dtype: DType) -> None:
    scales, biases = (scales_of(dtype, 3, 11, 3, seed=seed) for seed in (1, 2))
    check(AFQ(random_bytes(3, 11, 3 * group_size * bits // 8), scales, biases, bits, group_size))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("group_size", "groups"), [(64, 128), (40, 56), (32, 32), (40, 1000)])
def test_hqq(bits: int, axis: int, group_size: int, groups: int) -> None:
    """3 bit: 64, 56 and 32 rows leave padding in the last word. 40, 56 and 1000 columns are not whole vectors."""
    rows, columns = (group_size, groups) if axis == 0 else (groups, group_size)
    height = -(-rows // PLANES[bits])
    words = random_bytes(height, columns * (4 if bits == 3 else 1))
    parts = (1, groups) if axis == 0 else (groups, 1)
    for dtype in FLOATS:
        scales, zeros = (scales_of(dtype, *parts, seed=seed) for seed in (1, 2))
        check(HQQ(words, scales, zeros, (groups, group_size), bits, group_size, axis))


@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_narrower_than_a_vector_is_left_to_the_reference(axis: int) -> None:
    parts, shape = ((1, 31), (31, 16)) if axis == 0 else ((16, 1), (16, 31))
    record = HQQ(random_bytes(8, 31), torch.rand(parts), torch.rand(parts), shape, 4, shape[1], axis)
    assert record.dequantize_by_kernel(torch.float32) is None
    assert_same(record.dequantize(torch.float16), record._dequantize().to(torch.float16), "narrow")


@pytest.mark.parametrize("scale", [1.0, -0.0, 1e-40, 3e38, np.inf, np.nan])
def test_fp8(scale: float) -> None:
    """Every code; 37 columns leave a partial vector."""
    codes = torch.arange(7 * 37, dtype=torch.int32).to(torch.uint8).reshape(7, 37).view(torch.float8_e4m3fn)
    check(FP8(codes, *3 * [torch.tensor(scale, dtype=torch.float32)]))


@pytest.mark.parametrize("shape", [(256, 256), (3, 41), (1,), (5, 7, 32)])
def test_f8q8(shape: tuple[int, ...]) -> None:
    """Every scale over every code; blocks across rows; a last block that is partly padding, and nothing else."""
    count = -(-int(np.prod(shape)) // 32)
    blocks = random_bytes(count, 33)
    blocks[:, 0] = torch.arange(count) % 256
    check(F8Q8(blocks, shape))


def test_mxfp4() -> None:
    """Every scale, 0 and 255 among them, over every pair of nibbles."""
    check(
        MXFP4(torch.arange(256, dtype=torch.uint8).repeat(256, 1), torch.arange(256, dtype=torch.uint8).repeat(16, 1).T)
    )


@pytest.mark.parametrize(
    "record",
    [
        AFQ(random_bytes(2, 32), torch.rand(2, 1), torch.rand(2, 2), 4, 64),
        AFQ(random_bytes(2, 64), torch.rand(1, 1), torch.rand(1, 1), 4, 64),
        HQQ(random_bytes(4, 64), torch.rand(1, 64), torch.rand(1, 64), (64, 16), 4, 16, 0),
        HQQ(random_bytes(8, 64), torch.rand(1, 63), torch.rand(1, 64), (64, 16), 4, 16, 0),
        MXFP4(random_bytes(2, 32), random_bytes(2, 1)),
        F8Q8(random_bytes(1, 33), (3, 11)),
        FP8(random_bytes(2, 16).view(torch.float8_e4m3fn), *3 * [torch.ones(3)]),
    ],
    ids=lambda record: record.kind,
)
def test_parts_that_do_not_fit_are_never_read_beyond_their_end(record: QuantizedTensor) -> None:
    """A record made by hand is not validated; the reference complains about it."""
    assert record.dequantize_by_kernel(torch.float32) is None
    with pytest.raises(RuntimeError):
        record.dequantize()


@given(weights)
def test_any_record(record: QuantizedTensor) -> None:
    """Every family, small and odd shapes, ranks 1 to 4, any bits; where there is no kernel, the reference serves."""
    reference = record._dequantize()
    for dtype in DTYPES:
        assert_same(record.dequantize(dtype), reference.to(dtype), f"{record} to {dtype}")


@given(st.sampled_from(BLOCK_TYPES), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_any_blocks(block_type: BlockType, count: int, seed: int) -> None:
    check(GGUF(random_bytes(count * block_type.type_size, seed=seed), block_type), may_decline=count < 32)


@pytest.mark.parametrize("block_type", BLOCK_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("offset", [1, 2, 63])
def test_data_at_any_address(block_type: BlockType, offset: int) -> None:
    buffer = random_bytes(offset + 64 * block_type.type_size)
    check(GGUF(torch.from_numpy(buffer.numpy()[offset:]), block_type))


def test_a_slice_that_is_not_contiguous() -> None:
    """A record of it has the bytes of the slice."""
    data = random_bytes(6, 4 * 18)[:, 18:54]
    record = GGUF(data, next(t for t in BLOCK_TYPES if t.name == "Q4_0"))
    assert torch.equal(record.data, data)
    check(record)


def tensors_of(record: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {name: part.tensor() for name, part in record.parts.items()}


def large_records() -> list[QuantizedTensor]:
    """More weights than a thread takes at once, not a multiple of it."""
    q4k = next(t for t in BLOCK_TYPES if t.name == "Q4K")
    return [
        GGUF(random_bytes(1111, 144), q4k),
        Unquant.of(torch.randn(443, 601, generator=torch.Generator().manual_seed(1))),
        HQQ(random_bytes(32, 4099), torch.rand(1, 4099), torch.rand(1, 4099), (4099, 64), 4, 64, 0),
        HQQ(random_bytes(410, 256), torch.rand(4099, 1), torch.rand(4099, 1), (4099, 64), 3, 64, 1),
        AFQ(random_bytes(1111, 96), torch.rand(1111, 8), torch.rand(1111, 8), 3, 32),
    ]


@pytest.mark.parametrize("threads", ["1", "3"])
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch, threads: str) -> None:
    monkeypatch.setenv("UQFF_NUM_THREADS", threads)
    for record in large_records():
        check(record)


def test_the_record_is_not_modified() -> None:
    for record in large_records():
        before = [tensor.clone() for tensor in tensors_of(record).values()]
        record.dequantize(torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(record).values(), strict=True))


RECORD = MXFP4(random_bytes(6, 32), random_bytes(6, 2) // 2)


def test_out_is_written_and_returned() -> None:
    for dtype in DTYPES:
        out = torch.empty(6, 64, dtype=dtype)
        assert RECORD.dequantize(out=out) is out
        assert_same(out, RECORD._dequantize().to(dtype), str(dtype))


@pytest.mark.parametrize(
    ("out", "dtype", "problem"),
    [
        (torch.empty(64, 6), None, r"wrong shape: expected \[6, 64\], got \[64, 6\] \(field out\)"),
        (torch.empty(6, 64, dtype=torch.float64), None, "wrong dtype: expected torch.float32 or .*, got torch.float64"),
        (torch.empty(6, 64), torch.float16, "wrong dtype: expected torch.float16, got torch.float32"),
        (torch.empty(64, 6).T, None, "not contiguous: expected a contiguous tensor, got strides"),
        (torch.empty(6, 64, device="meta"), None, "wrong device: expected cpu, got meta"),
    ],
)
@pytest.mark.parametrize("choice", ["numba", "reference"])
def test_another_out_is_refused(
    monkeypatch: pytest.MonkeyPatch, choice: str, out: torch.Tensor, dtype: torch.dtype | None, problem: str
) -> None:
    monkeypatch.setenv("UQFF_KERNELS", choice)
    with pytest.raises(ShapeError, match=problem):
        RECORD.dequantize(dtype, out=out)


def test_a_dtype_without_kernel_comes_from_the_reference() -> None:
    assert RECORD.dequantize_by_kernel(torch.float64) is None
    assert torch.equal(RECORD.dequantize(torch.float64), RECORD._dequantize().to(torch.float64))


def test_the_variable_forces_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UQFF_KERNELS", "reference")
    assert not simd.enabled()
    assert RECORD.dequantize_by_kernel(torch.float32) is None
    out = torch.empty(6, 64, dtype=torch.bfloat16)
    assert RECORD.dequantize(out=out) is out
    assert_same(out, RECORD._dequantize().to(torch.bfloat16), "reference")


def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UQFF_KERNELS", "fast")
    with pytest.raises(ValueError, match="UQFF_KERNELS: expected 'numba' or 'reference', got 'fast'"):
        simd.enabled()


def test_without_numba_the_reference_serves_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UQFF_KERNELS", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    simd._compiles.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            first, second = RECORD.dequantize(), RECORD.dequantize()
        assert [str(w.message).split(" (")[0] for w in seen] == ["numba cannot be imported"]
        assert_same(first, RECORD._dequantize(), "first")
        assert_same(second, first, "second")
    finally:
        simd._compiles.cache_clear()


def test_importing_uqff_imports_neither_numba_nor_torch() -> None:
    code = "import sys, uqff, uqff.simd; print([m for m in ('numba', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_new_memory_is_aligned_to_a_cache_line() -> None:
    """A vector that fills a line whole is stored without reading the line first."""
    from uqff.simd.memory import empty

    for count in (1, 100, 1 << 20):
        assert empty((count,), torch.float32).data_ptr() % 64 == 0
