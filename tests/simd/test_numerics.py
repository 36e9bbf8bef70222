"""What the dequantise kernels share: narrow floats, rounding by the CPU and by bits, proofs about subnormals."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from llvmlite import binding
from numba.core.registry import cpu_target

from uqff.numerics.packing import e4m3_to_float32, f16_to_float32
from uqff.simd import cpu, load_store, vectors
from uqff.simd import output as numerics
from uqff.simd.output import BF16, F16, F32, NORMAL_BF16
from uqff.simd.vectors import LANES

pytestmark = pytest.mark.long

LOW_HALVES = np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
ROUNDING = (np.arange(65536, dtype=np.uint32)[:, None] << 16 | LOW_HALVES).reshape(-1)
ROUNDING = np.where((ROUNDING & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, ROUNDING).astype(np.uint32)
"""Bits of float32 numbers at, before and after all ties of bfloat16; infinities; the one NaN that kernels see."""
SUBNORMAL = ((ROUNDING & 0x7FFFFFFF) < 0x00800000) & ((ROUNDING & 0x7FFFFFFF) > 0)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(error_model="numpy")(function)


_unfold, _zero_or_from = numerics.unfold, numerics.zero_or_from
unfold = compiled(lambda strip, data, kind, first, count, least: _unfold(strip, data, kind, first, count, least))
zero_or_from = compiled(lambda least, x: _zero_or_from(least, x))


def rounded(numbers: np.ndarray[Any, Any], store: Callable[..., Any]) -> np.ndarray[Any, Any]:
    """Bits of what ``store(out, byte, x, y)`` makes of float32 numbers, 32 at a time."""

    def run(numbers: Any, out: Any) -> None:
        for i in range(0, len(numbers), 2 * LANES):
            store(out, 2 * i, load_store.load_f32(numbers, i), load_store.load_f32(numbers, i + LANES))

    out = np.empty(2 * len(numbers), np.uint8)
    compiled(run)(numbers, out)
    return out.view(np.uint16)


def assert_rounded(got: np.ndarray[Any, Any], bits: np.ndarray[Any, Any]) -> None:
    """As torch rounds, which has another NaN."""
    expected = torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16)
    same = (got == expected.view(torch.uint16).numpy()) | (((got & 0x7FFF) > 0x7F80) & expected.isnan().numpy())
    assert same.all(), hex(bits[same.argmin()])


@pytest.mark.parametrize("way", ["_store_normal", "_store_by_bits"])
def test_rounding_to_bfloat16_of_normal_numbers(way: str) -> None:
    """Ties, carries into the exponent and to infinity, signed zeros, infinities, NaN; by the CPU where it can."""
    numbers = np.where(SUBNORMAL, 0, ROUNDING).astype(np.uint32)
    assert_rounded(rounded(numbers.view(np.float32), getattr(numerics, way)), numbers)


def test_rounding_to_bfloat16_of_all_numbers() -> None:
    """Subnormal ones, and those that are rounded up to a normal one."""
    assert_rounded(rounded(ROUNDING.view(np.float32), numerics._store_by_bits), ROUNDING)


LINUX, MAC = "x86_64-unknown-linux-gnu", "arm64-apple-darwin"


@pytest.mark.parametrize(
    ("triple", "features", "llvm", "has"),
    [
        (LINUX, "+avx2,-f16c,-avx512bf16", (20, 1, 0), (False, False, False)),
        (LINUX, "+avx2,+f16c,-avx512f,-avx512bf16", (20, 1, 0), (True, False, False)),
        (LINUX, "+avx512f,+f16c,-avx512bf16", (20, 1, 0), (True, False, True)),
        (LINUX, "+avx512f,+f16c,+avx512bf16", (20, 1, 0), (True, True, True)),
        (LINUX, "+avx512f,+f16c,+avx512bf16", (15, 0, 7), (True, False, True)),
        ("aarch64-unknown-linux-gnu", "+neon,+bf16", (20, 1, 0), (True, False, False)),
        (MAC, "+neon", (20, 1, 0), (True, False, False)),
    ],
)
def test_what_a_cpu_can_is_read_off_its_features(
    triple: str,
    features: str,
    llvm: tuple[int, int, int],
    has: tuple[bool, bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not every AVX-512 rounds to bfloat16; another CPU's instruction is another; old LLVM has other types for it."""

    class Codegen:
        def magic_tuple(self) -> tuple[str, str, str]:
            return triple, "cpu", features

    monkeypatch.setattr(cpu_target.target_context, "codegen", Codegen)
    monkeypatch.setattr(binding, "llvm_version_info", llvm)
    assert cpu.abilities() == has


def test_this_process_takes_what_its_cpu_has() -> None:
    """A CPU without the instruction has no form of its own for it: what asks for it gets the rounding by bits."""
    assert cpu.abilities() == (cpu.HAS_HALF, cpu.HAS_BF16, cpu.HAS_PERMUTE)
    assert (NORMAL_BF16 == BF16) is not cpu.HAS_BF16
    by_cpu = numerics._store_normal is numerics._store_by_cpu
    assert by_cpu is cpu.HAS_BF16


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names a CPU of x86-64")
def test_a_cpu_without_any_of_it_gives_the_same_bits(tmp_path: Path) -> None:
    """Neither float16 nor bfloat16 nor looking up: kernels of several families, in a process that compiles for it."""
    tests_folder = Path(__file__).parent.parent
    tests = [
        "families/test_cpu_dequantize.py::test_fp8",
        "families/test_cpu_dequantize.py::test_mxfp4",
        "families/test_subnormals.py::test_q8k",
        "families/test_subnormals.py::test_afq_cancellation_at_the_bound",
        "families/test_subnormals.py::test_types_of_float16_have_no_subnormal_weights[Q5_1]",
        "simd/test_numerics.py::test_every_e4m3_code",
    ]
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse2", "NUMBA_CACHE_DIR": str(tmp_path)}
    plain["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # some warn when they run inside others
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(str(tests_folder / test) for test in tests),
    ]
    run = subprocess.run(command, env=os.environ | plain, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.mark.parametrize("form", [F32, BF16, F16])
@pytest.mark.parametrize("certain", [False, True])
def test_only_bfloat16_without_subnormals_is_rounded_by_the_cpu(form: int, certain: bool) -> None:
    expected = NORMAL_BF16 if form == BF16 and certain else form
    without_subnormals = numerics.without_subnormals
    assert compiled(lambda form, certain: without_subnormals(form, certain))(form, certain) == expected


@pytest.mark.parametrize("exponent", [-126, -117, -103, -51, 0])
def test_zero_or_from(exponent: int) -> None:
    least = np.float32(2.0**exponent)
    below = np.nextafter(least, np.float32(0))
    for x in (0.0, -0.0, least, -least, np.nextafter(least, np.float32(1e38)), np.inf, -np.inf, np.nan):
        assert zero_or_from(least, np.float32(x))
    for x in (below, -below, np.float32(1e-45), np.float32(-1e-45), least / 2):
        assert not zero_or_from(least, np.float32(x))


KINDS = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33, 64])
def test_unfold(kind: int, count: int) -> None:
    """Any count from any start; one small number is noticed wherever it is, one beside the part is not."""
    start, least = 3, np.float32(2.0**-14)
    small = torch.tensor(2.0**-15)
    for place in range(-1, count + 1):
        numbers = torch.randn(start + count + 1, generator=torch.Generator().manual_seed(count)).sign() * 2.0**-14
        numbers[start : start + count : 5] = torch.tensor([0.0, -0.0, torch.inf, torch.nan]).repeat(4)[
            : len(numbers[start : start + count : 5])
        ]
        numbers[start + place] = -small if place % 2 else small
        stored = numbers.to(KINDS[kind])
        strip = np.full(count + 1, 7, np.float32)
        certain = unfold(strip, stored.view(torch.uint8).numpy(), kind, start, count, least)
        assert certain is not (0 <= place < count)
        assert np.array_equal(strip[:count], numbers[start : start + count].numpy(), equal_nan=True)
        assert strip[count] == 7


def test_every_e4m3_code() -> None:
    """In either half of a vector; NaN stays NaN."""
    pair = numerics.e4m3_pair

    def run(codes: Any, out: Any) -> None:
        for i in range(0, len(codes), 2 * LANES):
            x, y = pair(load_store.load_bytes(codes, i))
            load_store.store_f32(out, i, x)
            load_store.store_f32(out, i + LANES, y)

    codes = np.concatenate([np.arange(256), np.roll(np.arange(256), LANES)]).astype(np.uint8)
    out = np.empty(len(codes), np.float32)
    compiled(run)(codes, out)
    expected = e4m3_to_float32(codes)
    assert np.array_equal(out, expected, equal_nan=True)
    assert np.array_equal(np.signbit(out), np.signbit(expected))


@pytest.mark.parametrize("way", ["f16_pair", "_f16_pair_by_bits"])
def test_every_pair_of_float16(way: str) -> None:
    """By the CPU and by bits, which must not depend on each other's being there."""
    pair = getattr(numerics, way)

    def run(codes: Any, out: Any) -> None:
        for i in range(0, len(out), 2 * LANES):
            x, y = pair(vectors.signed_words(load_store.load_bytes(codes, i)) << 8)
            load_store.store_f32(out, i, x)
            load_store.store_f32(out, i + LANES, y)

    high = np.arange(256, dtype=np.uint8)
    out = np.empty(256, np.float32)
    compiled(run)(high, out)
    assert np.array_equal(out, f16_to_float32(high.astype(np.uint16) << np.uint16(8)), equal_nan=True)


@pytest.mark.parametrize("picks", [False, True])
def test_looking_up_is_computing(picks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits of all codes under all kinds of scales, where codes are looked up and where they cannot be."""
    if picks and not cpu.HAS_PERMUTE:
        pytest.skip("this CPU does not look up")
    monkeypatch.setattr(numerics, "HAS_PERMUTE", picks)

    def affine(codes: Any, scale: Any, bias: Any) -> Any:
        return vectors.i32_to_f32(codes & 7) * scale + bias

    function = numerics.looked_up(affine)

    def run(codes: Any, scales: Any, out: Any) -> None:
        for i in range(len(scales)):
            for j in range(0, 256, LANES):
                codes_here = load_store.load_u8(codes, j)
                load_store.store_f32(out, 256 * i + j, function(codes_here, scales[i, 0], scales[i, 1]))

    special = np.array([0.0, -0.0, 1.0, -0.37, 1e-45, 1e-38, 3e38, np.inf, np.nan], np.float32)
    scales = np.stack(np.meshgrid(special, special), -1).reshape(-1, 2)
    codes = np.arange(256, dtype=np.uint8)
    out = np.empty((len(scales), 256), np.float32)
    compiled(run)(codes, scales, out.reshape(-1))
    with np.errstate(all="ignore"):
        expected = (codes & 7).astype(np.float32) * scales[:, :1] + scales[:, 1:]
    same = (out.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(out) & np.isnan(expected))
    assert same.all()
