"""bfloat16 weights below 2**-126 come out as they are, though a CPU's own rounding would make zeros of them.

Scales at, above and below the bounds from which kernels leave the rounding to the CPU, alone and beside ordinary ones.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from uqff.families import AFQ, FP8, GGUF, HQQ, MXFP4, QuantizedTensor
from uqff.families.gguf.blocks import BLOCK_TYPES

TINY = 2.0**-126


def check(record: QuantizedTensor) -> int:
    """The number of weights that are subnormal before they are rounded; all have the reference's bits."""
    weights = record._dequantize()
    expected = weights.to(torch.bfloat16)
    got = record.dequantize_by_kernel(torch.bfloat16)
    assert got is not None
    same = (got.view(torch.int16) == expected.view(torch.int16)) | (got.isnan() & expected.isnan())
    assert same.all(), f"{record}: {int((~same).sum())} of {same.numel()}"
    return int(((weights != 0) & (weights.abs() < TINY)).sum())


def around(exponent: int) -> list[float]:
    """Magnitudes at a bound and next to it, with full mantissas, and half of it."""
    bound = np.float32(2.0**exponent)
    low, high = np.nextafter(bound, np.float32(0)), np.nextafter(bound, np.float32(1))
    return [float(x) for x in (bound, low, high, bound * np.float32(1.9999999), bound / 2, np.float32(1.5) * bound / 2)]


def pairs(exponents: tuple[int, ...]) -> torch.Tensor:
    """Scales and what is added or subtracted, both of such magnitudes, zero, or ordinary, with both signs."""
    values = [0.0, 1.0, *(x for exponent in exponents for x in around(exponent))]
    values += [-x for x in values]
    return torch.cartesian_prod(*2 * [torch.tensor(values, dtype=torch.float32)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "together"])
def test_afq(bits: int, dtype: torch.dtype, alone: bool) -> None:
    """``q * s + b`` cancels to less than either from 2**-103 down; each pair for itself, or all in one strip."""
    both = pairs((-102, -103, -104, -126, -140)).to(dtype)
    both = both[:: 97 if alone else 1]
    codes = torch.from_numpy(np.random.default_rng(bits).integers(0, 256, (len(both), 32 * bits // 8), np.uint8))
    records = [
        AFQ(codes[part], both[part, :1].contiguous(), both[part, 1:].contiguous(), bits, 32)
        for part in ([slice(i, i + 1) for i in range(len(both))] if alone else [slice(None)])
    ]
    assert sum(map(check, records)) > 0


def test_afq_cancellation_at_the_bound() -> None:
    """The smallest difference of scales and biases from 2**-103 on is 2**-126; of smaller ones it is subnormal."""
    codes = torch.tensor([[0x11] * 16], dtype=torch.uint8)
    for exponent, subnormal in ((-103, 0), (-104, 32), (-110, 32)):
        bound = np.float32(2.0**exponent)
        scale, bias = (torch.tensor([[x]]) for x in (np.nextafter(bound, np.float32(1)), -bound))
        record = AFQ(codes, scale, bias, 4, 32)
        assert float(record._dequantize()[0, 0]) == math.ldexp(1, exponent - 23)
        assert check(record) == subnormal


def test_one_small_scale_among_many() -> None:
    """Wherever it is among more groups than are looked at together, and in the parts of several threads."""
    for groups in (1, 31, 513, 2100):
        for place in {0, groups // 2, groups - 1}:
            scale, bias = torch.ones(groups, 1), torch.zeros(groups, 1)
            scale[place] = 2.0**-130
            codes = torch.full((groups, 64), 0x11, dtype=torch.uint8)
            assert check(AFQ(codes, scale, bias, 4, 128)) == 128
            if groups > 31:
                codes = torch.full((32, groups), 0x11, dtype=torch.uint8)
                assert check(HQQ(codes, scale.T.contiguous(), bias.T.contiguous(), (groups, 64), 4, 64, 0)) == 64
            codes = torch.full((-(-groups // 2), 64), 0x11, dtype=torch.uint8)
            assert check(HQQ(codes, scale, bias, (groups, 64), 4, 64, 1)) == 64


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_hqq(bits: int, axis: int) -> None:
    """``(q - z) * s``, whose factors may both be small: from 2**-63 on their product is not."""
    both = pairs((-51, -62, -63, -64, -75, -126))
    records = []
    # All of these in one strip, then those that the CPU rounds, then ever more of them.
    for least in (0.0, 2.0**-63, float(np.nextafter(np.float32(2.0**-63), np.float32(0))), 2.0**-64, 2.0**-76):
        magnitude = both.abs()
        some = both[((magnitude == 0) | (magnitude >= least)).all(1)]
        groups = len(some)
        codes = np.random.default_rng(bits).integers(0, 256, 64 * groups, np.uint8)
        zeros, scales = ((x.T if axis == 0 else x).contiguous() for x in (some[:, :1], some[:, 1:]))
        rows, columns = (64, groups) if axis == 0 else (groups, 64)
        planes = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
        height = -(-rows // planes)
        size = height * columns * (4 if bits == 3 else 1)
        words = torch.from_numpy(np.resize(codes, (height, size // height)))
        records.append(HQQ(words, scales, zeros, (groups, 64), bits, 64, axis))
    assert [check(record) > 0 for record in records] == [True, False, True, True, True]


@pytest.mark.parametrize("exponent", [-116, -117, -118, -126, -135, -140])
def test_fp8(exponent: int) -> None:
    """The smallest code is 2**-9."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(8, 32).view(torch.float8_e4m3fn)
    subnormal = 0
    for magnitude in around(exponent):
        for scale in (magnitude, -magnitude):
            subnormal += check(FP8(codes, *3 * [torch.tensor(scale, dtype=torch.float32)]))
    assert (subnormal > 0) == (exponent <= -117)  # half of 2**-117 is among its neighbours


def test_q8k() -> None:
    """Integers times a float32 scale, which is subnormal or is not; block for block."""
    q8k = next(t for t in BLOCK_TYPES if t.name == "Q8K")
    scales = [0.0, 1.0, np.inf, np.nan, *around(-125), *around(-126), *around(-127), *around(-140)]
    blocks = np.random.default_rng(0).integers(0, 256, (2 * len(scales), q8k.type_size), np.uint8)
    blocks.view(q8k.numpy)["d"][:, 0] = np.concatenate([scales, np.negative(scales)])
    assert check(GGUF(torch.from_numpy(blocks), q8k)) > 0


def test_mxfp4() -> None:
    """1/2 times 2**-126 is the only subnormal weight there is: scale 0 stands for 0."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(4, 1, 1).reshape(4, 256)
    for scale, subnormal in ((0, 0), (1, 256), (2, 0)):
        assert check(MXFP4(codes, torch.full((4, 16), scale, dtype=torch.uint8))) == subnormal
    assert check(MXFP4(codes, torch.arange(64, dtype=torch.uint8).reshape(4, 16))) > 0


@pytest.mark.parametrize("name", [t.name for t in BLOCK_TYPES if t.name not in ("F32", "BF16", "Q8K")])
def test_types_of_float16_have_no_subnormal_weights(name: str) -> None:
    """What their kernels take for granted: multiples of 2**-24 remain such. All pairs of small scales and minimums."""
    block_type = next(t for t in BLOCK_TYPES if t.name == name)
    small = np.array([0, 0x8000, 1, 2, 3, 0x3FF, 0x400, 0x401, 0x8001, 0x83FF, 0x8400, 0xBC00], np.uint16)
    blocks = np.random.default_rng(1).integers(0, 256, (len(small) ** 2, block_type.type_size), np.uint8)
    view = blocks.view(block_type.numpy)
    fields = [field for field in view.dtype.names or () if view[field].dtype.kind == "f"]
    for field, values in zip(fields, np.meshgrid(small, small), strict=False):
        view[field] = values.reshape(-1, 1).view(np.float16)
    record = GGUF(torch.from_numpy(blocks.reshape(len(small), -1)), block_type)
    weights = record._dequantize()
    units = weights[weights.isfinite()].double() * 2.0**24
    assert (units == units.round()).all()
    assert check(record) == 0
