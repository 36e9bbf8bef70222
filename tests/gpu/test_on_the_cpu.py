"""Kernels of GPUs, compiled as plain C++: what a thread decodes and multiplies can be tested where there is no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import uqff
from tests.gpu.compiled import known, row_bytes
from tools.bench.bits import same_bits
from uqff import QuantizedTensor
from uqff.gpu import kernels
from uqff.gpu.source import decoders_source

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1")
MOST = (*LEGACY, "q2k", "q3k", "q4k", "q5k", "q6k", "q8k", "fp8", "f8q8", "mxfp4", "afq2", "afq3", "afq4", "afq6")
KINDS = (*MOST, "afq8", "hqq1", "hqq2", "hqq3", "hqq4", "hqq8")


def record(kind: str) -> QuantizedTensor:
    """Of 16 rows; of HQQ, rows of M are not those of the weight."""
    shape = (24, 328) if kind.startswith("hqq") else (16, 768)
    return uqff.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16(), kind)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, dict[str, QuantizedTensor]]:
    """A library with functions of every type, and weights."""
    weights = {kind: record(kind) for kind in KINDS}
    stored = {kind: known(weight) for kind, weight in weights.items()}
    families = sorted({each.family for each in stored.values()})
    source = [(HERE / "machine.h").read_text(), decoders_source(families), (HERE / "lanes.h").read_text()]
    for kind, each in stored.items():
        for run in (4, 8):
            source.append(f'extern "C" void {kind}_{run}(const Weight* w, float* out) {{')
            source.append(f"    decode_all<{each.decoder}, {run}>(*w, out);\n}}")
        if each.along:
            arguments = "const Weight* w, const i64* bytes, const u8* x, double* y, double* z, int n"
            source.append(f'extern "C" void {kind}_x({arguments}) {{')
            source.append(f"    multiply_all<{each.decoder}>(*w, bytes, x, y, z, 16, n);\n}}")
            source.append(f'extern "C" void {kind}_coded(const Weight* w, const i64* bytes, float* out, int n) {{')
            source.append(f"    coded_all<{each.decoder}>(*w, bytes, out, 16, n);\n}}")
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "all.cpp").write_text("\n".join(source))
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
    command = [str(COMPILER), *options, "-o", str(folder / "all.so"), str(folder / "all.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[:4000]
    return ctypes.CDLL(str(folder / "all.so")), weights


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_have_the_bits_of_the_reference(
    compiled: tuple[ctypes.CDLL, dict[str, QuantizedTensor]], kind: str
) -> None:
    """Of ordinary weights and of random bytes, whatever they stand for, in runs of 4 and 8."""
    library, weights = compiled
    generator = torch.Generator().manual_seed(4)
    weight, parts = weights[kind], {}
    for name, part in weight.parts.items():
        data = torch.randint(0, 256, (part.nbytes,), dtype=torch.uint8, generator=generator)
        parts[name] = data.view(part.dtype.torch).reshape(part.shape)
    for each in (weight, weight.replaced(**parts)):
        expected = each._dequantize()
        for run in (4, 8):
            out = np.full(each.numel + 1, 7.0, np.float32)
            given = kernels.Weight.of(known(each), each.numel)
            library[f"{kind}_{run}"](ctypes.byref(given), out.ctypes.data_as(ctypes.c_void_p))
            assert out[-1] == 7
            assert same_bits(torch.from_numpy(out[:-1]).view(each.shape), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("hqq")])
def test_products_are_those_with_the_numbers(
    compiled: tuple[ctypes.CDLL, dict[str, QuantizedTensor]], kind: str
) -> None:
    """Codes, scales and activations that lanes load belong to each other; only offsets are off by float32 roundings."""
    library, weights = compiled
    weight = weights[kind]
    x = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(5)).bfloat16()
    strides = (ctypes.c_int64 * 3)(*row_bytes(weight))
    given, made = kernels.Weight.of(known(weight), weight.numel), torch.zeros(2, 16, dtype=torch.float64)
    at, y, z = (ctypes.c_void_p(each.data_ptr()) for each in (x, *made))
    library[f"{kind}_x"](ctypes.byref(given), strides, at, y, z, weight.shape[1])
    numbers, exact = weight._dequantize().double(), x.double()
    # b is rounded once, at a size of up to 136 scales: a few thousand times what codes are.
    allowed = 2**-24 * 256 * (numbers.abs() @ exact.abs() + numbers.abs().max() * exact.abs().sum())
    assert bool(((made[0] - numbers @ exact).abs() <= allowed).all())
    # FP8 is not rounded. Of the others, one in 64 may be so to the other side, where b's rounding matters.
    rounded = numbers if kind == "fp8" else numbers.bfloat16().double()
    allowed += 2**-8 * 2**-6 * (numbers.abs() @ exact.abs())
    assert bool(((made[1] - rounded @ exact).abs() <= allowed).all())


@pytest.mark.parametrize("size", [1, 1e30, 1e-30])
@pytest.mark.parametrize("kind", ["afq2", "afq3", "afq4", "afq6", "afq8", "mxfp4"])
def test_weights_that_are_rounded_once(
    compiled: tuple[ctypes.CDLL, dict[str, QuantizedTensor]], kind: str, size: float
) -> None:
    """Without float32 in between they are those that dequantising rounds, also of weights next to nothing, or huge."""
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(16, 768, generator=generator) * (torch.rand(16, 768, generator=generator) < 0.02) * size
    weight = uqff.quantize(values.bfloat16(), kind)
    x = torch.randn(768, generator=generator).bfloat16()
    strides, made = (ctypes.c_int64 * 3)(*row_bytes(weight)), torch.zeros(2, 16, dtype=torch.float64)
    at, y, z = (ctypes.c_void_p(each.data_ptr()) for each in (x, *made))
    given = kernels.Weight.of(known(weight), weight.numel)
    compiled[0][f"{kind}_x"](ctypes.byref(given), strides, at, y, z, 768)
    rounded, exact = weight._dequantize().bfloat16().double(), x.double()
    allowed = 2**-8 * 2**-6 * (rounded.abs() @ exact.abs())
    assert bool(rounded.any())
    assert bool(((made[1] - rounded @ exact).abs() <= allowed).all())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("hqq")])
def test_codes_as_float16_are_those_of_the_numbers(
    compiled: tuple[ctypes.CDLL, dict[str, QuantizedTensor]], kind: str
) -> None:
    """Each at its place, with the scale of its group; what a scale is made of may be rounded in another order."""
    library, weights = compiled
    weight = weights[kind]
    out, strides = torch.full(weight.shape, 7.0), (ctypes.c_int64 * 3)(*row_bytes(weight))
    given = kernels.Weight.of(known(weight), weight.numel)
    library[f"{kind}_coded"](ctypes.byref(given), strides, ctypes.c_void_p(out.data_ptr()), weight.shape[1])
    numbers = weight._dequantize()
    assert bool(((out - numbers).abs() <= 2**-22 * (numbers.abs() + numbers.abs().max())).all())
