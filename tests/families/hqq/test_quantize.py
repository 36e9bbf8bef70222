"""HQQ reference quantiser: by hand, against the client's files, and its logf and expf against glibc."""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import pytest

from tests.support.by_hand import Blob, golden_files, v0_layers
from uqff.families.hqq.reference import idle, mean_magnitude, quantize, shrink
from uqff.numerics.glibc import expf, logf
from uqff.numerics.packing import unpack_planes


def test_by_hand() -> None:
    """A ramp 0..15, four times: s = 1, zero = 0, every code its element, no error, nothing to improve."""
    w = np.tile(np.arange(16, dtype=np.float32), 4)
    packed, scales, zeros = quantize(w, 4)
    assert packed[:, 0].tolist() == [16 * (i % 16) + i % 16 for i in range(32)]
    assert (scales.tolist(), zeros.tolist()) == ([[1.0]], [[0.0]])


def test_groups_are_columns() -> None:
    """Element i * N + j belongs to group j, and row i of the planes."""
    w = np.stack([np.tile(np.arange(16), 4), 2 * np.tile(np.arange(15, -1, -1), 4)], axis=-1).astype(np.float32)
    packed, scales, _ = quantize(w.reshape(16, 8), 4)
    codes = unpack_planes(packed, 4)
    assert codes[:16].T.tolist() == [list(range(16)), list(range(15, -1, -1))]
    assert scales.tolist() == [[1.0, 2.0]]


def test_constant_group() -> None:
    """The scale 15 * (1/0) is clamped to 2e4, zero is then -w * 2e4."""
    packed, scales, zeros = quantize(np.full(64, 0.25, np.float32), 4)
    assert not packed.any()
    assert (scales.tolist(), zeros.tolist()) == ([[np.float32(1) / np.float32(2e4)]], [[-5000.0]])


def test_zeros_have_no_sign() -> None:
    packed, _, zeros = quantize(np.full(64, -0.0, np.float32), 8)
    assert not packed.any()
    assert zeros.tobytes() == np.zeros((1, 1), np.float32).tobytes()


def test_scale_is_the_reciprocal_times_top() -> None:
    """(1/7) * 15 and 15/7 differ in float32."""
    w = np.zeros(64, np.float32)
    w[0] = 7
    s = np.float32(1) / np.float32(7) * np.float32(15)
    assert s != np.float32(15) / np.float32(7)
    assert quantize(w, 4)[1].tolist() == [[np.float32(1) / s]]


def test_stops_when_the_error_does_not_fall() -> None:
    """From some number of turns on nothing changes any more; up to it, each turn moves the zeros, the last one too."""
    w = np.random.default_rng(5).standard_normal(64 * 8, dtype=np.float32)
    results = [quantize(w, 8, steps=n)[2].tobytes() for n in range(1, 30)]
    last = next(n for n in range(len(results)) if len(set(results[n:])) == 1)
    assert 0 < last < 20
    assert len(set(results[: last + 1])) == last + 1


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_all_widths(bits: int) -> None:
    """Codes span 0..2^bits - 1, and the error is within the step."""
    w = np.random.default_rng(bits).standard_normal(64 * 9, dtype=np.float32)
    packed, scales, zeros = quantize(w, bits)
    codes = unpack_planes(packed, bits)[:64]
    assert packed.dtype == (np.int32 if bits == 3 else np.uint8)
    assert len(packed) == {8: 64, 4: 32, 3: 7, 2: 16, 1: 8}[bits]
    assert (codes.min(), codes.max()) == (0, 2**bits - 1)
    assert (np.abs((codes - zeros) * scales - w.reshape(64, 9)) <= scales).all()


def test_range_beyond_float32() -> None:
    """The scale is infinite; the error, a NaN, ends the optimisation after its first turn, which makes the zero 0."""
    w = np.zeros(64, np.float32)
    w[:2] = [3e38, -3e38]
    packed, scales, zeros = quantize(w, 4)
    assert not packed.any()
    assert scales.tolist() == [[np.inf]]
    assert zeros.tolist() == [[0.0]]


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 100, 1000])
def test_mean_is_added_in_candles_order(size: int) -> None:
    """Against vec_sum and vec_reduce of candle, spelt out one addition at a time."""
    x = np.random.default_rng(size).standard_cauchy(size).astype(np.float32)
    lanes = [np.float32(0)] * 32
    full = size // 32 * 32
    for k in range(full):
        lanes[k % 32] = lanes[k % 32] + np.abs(x[k])
    vectors = [lanes[0:8], lanes[8:16], lanes[16:24], lanes[24:32]]
    eight = [(vectors[0][k] + vectors[1][k]) + (vectors[2][k] + vectors[3][k]) for k in range(8)]
    four = [eight[k] + eight[k + 4] for k in range(4)]
    total = (four[0] + four[1]) + (four[2] + four[3])
    for k in range(full, size):
        total = total + np.abs(x[k])
    assert mean_magnitude(x) == total * np.float32(1 / size)


def test_shrink() -> None:
    """0 up to |e|^1.3 = 1/beta, odd, and |e| less |e|^-0.3 / beta beyond; 1 needs no power."""
    assert 0.168 < idle(10.0) < 0.1702
    e = np.array([0.0, -0.0, 0.1, -0.17, 1.0, -1.0, 0.171], np.float32)
    result = shrink(e, 10.0)
    assert result[:4].tolist() == [0, 0, 0, 0]
    assert result[4:6].tolist() == [np.float32(1) - np.float32(0.1), np.float32(0.1) - np.float32(1)]
    assert 0 < result[6] < 0.002


def test_shrink_is_zero_where_it_is_not_computed() -> None:
    """Just above idle the formula itself gives 0: the margin hides nothing."""
    for beta in [10.0, 10.94, 12.2, 50.0]:
        start = idle(beta).view(np.int32)
        near = np.arange(start - 2000, start + 2000, dtype=np.int32).view(np.float32)
        assert not shrink(near, beta).any()


@pytest.mark.parametrize("file", [*golden_files("hqq")])
def test_equals_client(file: str) -> None:
    layers = 0
    for name, data, w, _ in v0_layers(file):
        blob = Blob(data)
        _, family, _ = blob.take("IBB")
        if family != 2:
            continue
        layers += 1
        stored, stored_scales, stored_zeros = blob.record(), blob.record(), blob.record()
        (ndim,) = blob.take("I")
        assert blob.take(f"{ndim}I") == w.shape, name
        bits, group_size, axis, steps, round_zeros, channel_wise = blob.take("BIBIBB")
        assert (axis, round_zeros, channel_wise) == (0, 0, 1)
        packed, scales, zeros = quantize(w, bits, group_size, steps)
        assert (packed.shape, scales.shape, zeros.shape) == (stored.shape, stored_scales.shape, stored_zeros.shape)
        assert packed.tobytes() == stored.tobytes(), name
        assert scales.tobytes() == stored_scales.tobytes(), name
        assert zeros.tobytes() == stored_zeros.tobytes(), name
    assert layers


def test_golden_files_shrink() -> None:
    """Some client file has errors large enough for logf and expf, or the comparison above would not cover them."""
    largest = 0.0
    for file in golden_files("hqq4"):
        for _, _, w, _ in v0_layers(file):
            packed, scales, zeros = quantize(w, 4, steps=1)
            error = (unpack_planes(packed, 4) - zeros) * scales - w.reshape(64, -1)
            largest = max(largest, float(np.abs(error).max()))
    assert largest > 0.5


def test_logf_and_expf_where_they_are_not_correctly_rounded() -> None:
    """Pinned from glibc 2.36; the correctly rounded results are the neighbours."""
    x = np.array([float.fromhex("0x1.99a05cp-4"), float.fromhex("0x1.199d2ap-3"), 1.0], np.float32)
    assert logf(x).tolist() == [-2.302520751953125, -1.9840819835662842, 0.0]
    x = np.array([float.fromhex("-0x1.00d232p-10"), float.fromhex("-0x1.80c24p-10"), 0.0], np.float32)
    assert expf(x).tolist() == [0.9990208148956299, 0.9985333681106567, 1.0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's logf and expf")
def test_logf_and_expf_are_glibc() -> None:
    libm = ctypes.CDLL("libm.so.6")
    rng = np.random.default_rng(6)
    any_size = rng.integers(0x00800000, 0x7F800000, 20_000).astype(np.int32).view(np.float32)
    used = rng.uniform(0.1, 4, 20_000).astype(np.float32)
    exponents = np.concatenate([rng.uniform(-87, 88, 20_000), rng.uniform(-1, 1, 20_000)]).astype(np.float32)
    for ours, theirs, x in [(logf, libm.logf, np.concatenate([any_size, used])), (expf, libm.expf, exponents)]:
        theirs.argtypes, theirs.restype = [ctypes.c_float], ctypes.c_float
        assert ours(x).tobytes() == np.array([theirs(v) for v in x], np.float32).tobytes()
