"""Products with HQQ weights, compiled as plain C++: whole blocks of threads run, one after the other."""

from __future__ import annotations

import contextlib
import ctypes
import types

import pytest
import torch

import uqff
from tests.gpu.compiled import Compiled, compiled, launching, needs_compiler
from tools.bench.bits import same_bits
from uqff.codes import DType
from uqff.families import HQQ
from uqff.families.hqq import gpu
from uqff.gpu import kernels
from uqff.gpu.source import launched_source
from uqff.numerics.packing import packed_rows

pytestmark = needs_compiler

SHAPE = (128, 192)
BITS = (1, 2, 3, 4, 8)
CASES = [(bits, axis) for bits in BITS for axis in (0, 1) if (bits, axis) != (3, 1)]
DTYPES = {(bits, axis): DType.F16 if bits == 2 else DType.BF16 for bits, axis in CASES}
TILES = {1: 4, 2: 2, 3: 2, 4: 1, 8: 4}
"""Of a block, by bits."""


def record(bits: int, axis: int, shape: tuple[int, int] = SHAPE) -> HQQ:
    """Codes of any kind, scales and zeros as they may be."""
    generator = torch.Generator().manual_seed(bits + 10 * axis)
    groups = shape[0] * shape[1] // 64
    rows, columns = (64, groups) if axis == 0 else (groups, 64)
    packed = packed_rows(rows, bits), columns * (4 if bits == 3 else 1)
    codes = torch.randint(0, 256, packed, generator=generator).to(torch.uint8)
    scales, zeros = (torch.rand((1, groups) if axis == 0 else (groups, 1), generator=generator) for _ in range(2))
    return HQQ(codes, scales / 8, zeros * 2**bits, shape, bits, 64, axis)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Kernels of one and of eight rows for every case."""
    common = launched_source("hqq", "HqqProduct given", "", 0).partition('extern "C" __global__')[0]
    entries = [
        launching(
            f"hqq_{bits}_{axis}_{columns}",
            "HqqProduct",
            gpu.entry(f"Hqq<{bits}, {axis}, F32>", DTYPES[bits, axis], columns, TILES[bits]),
        )
        for bits, axis in CASES
        for columns in (1, 8)
    ]
    for bits in BITS:
        for dtype in (DType.F32, DType.BF16):
            body = gpu.numbers_entry(f"Hqq<{bits}, 0, F32>", dtype)
            run = f"launch(columns, rows, threads, [=] {{ const Weight& weight = *at; {body} }});"
            name = f"numbers_{bits}_{dtype.name}"
            takes = "int columns, int rows, int threads, const Weight* at, u8* out"
            entries.append(f'extern "C" void {name}({takes}) {{ {run} }}\n')
    return compiled([common, *entries], tmp_path_factory.mktemp("hqq"))


def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make believe that the CPU is a GPU."""
    monkeypatch.setattr(kernels, "available", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("bits", BITS)
def test_numbers_have_the_bits_of_the_reference(
    library: ctypes.CDLL, bits: int, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every plane; columns that are no whole block of threads."""
    weight = record(bits, 0, (128, 328))
    there(monkeypatch)
    monkeypatch.setattr(gpu, "_kernel", lambda *_: Compiled(library[f"numbers_{bits}_{dtype.name}"]))
    stored, out = weight.stored_on_gpu(), torch.full(weight.shape, 7.0, dtype=dtype.torch)
    assert stored is not None
    assert kernels.dequantize(stored, out)
    assert same_bits(out, weight._dequantize().to(dtype.torch))


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize(("bits", "axis"), CASES)
def test_products_are_those_with_the_numbers(
    library: ctypes.CDLL, bits: int, axis: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the last bits of what the inputs are split into, and of the result."""
    weight, dtype = record(bits, axis), DTYPES[bits, axis]
    x = torch.randn(columns, SHAPE[1], generator=torch.Generator().manual_seed(9)).to(dtype.torch)
    found = Compiled(library[f"hqq_{bits}_{axis}_{1 if columns == 1 else 8}"])
    monkeypatch.setattr(gpu, "_kernel", lambda *_: found)
    monkeypatch.setattr(gpu, "tiles_for", lambda *_: TILES[bits])
    there(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(multi_processor_count=1))
    stored = weight.stored_on_gpu()
    assert stored is not None
    got = kernels.multiply(stored, x, SHAPE[0])
    assert got is not None
    assert got.dtype is dtype.torch
    exact = x.double() @ weight._dequantize().double().T
    # Codes are 128 too large, and what they are multiplied with is exact to 2⁻¹⁷ of itself.
    offset = (weight.parts["scales"].tensor().abs().max().double() * 136) * x.double().abs().sum(1, keepdim=True)
    allowed = 2**-17 * offset + torch.finfo(dtype.torch).eps * exact.abs()
    assert bool(((got.double() - exact).abs() <= allowed).all())


def test_what_has_no_product_is_dequantised() -> None:
    """Outputs or inputs that are not whole groups of 64; other groups; 3 bits along axis 1, whose planes cut rows."""
    whole = record(4, 0)
    stored = whole.stored_on_gpu()
    assert stored is not None
    assert stored.product is not None
    narrow = record(3, 1)
    for weight in (narrow, uqff.quantize(torch.randn(96, 192), "hqq4"), uqff.quantize(torch.randn(128, 96), "hqq4")):
        stored = weight.stored_on_gpu()
        assert stored is None or stored.product is None


def test_tiles() -> None:
    """As many as leave blocks for most multiprocessors."""
    assert [gpu.tiles_for(rows, 132) for rows in (14336, 4096, 3072, 1024)] == [4, 2, 2, 1]
