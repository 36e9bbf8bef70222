"""Products of blocks that stay, compiled as plain C++: whole blocks of threads run, one after the other."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

import uqff
from tests.gpu.compiled import Compiled, compiled, known, launching, needs_compiler, row_bytes
from uqff import QuantizedTensor
from uqff.gpu import kernels
from uqff.gpu.source import decoders_source

pytestmark = needs_compiler

KINDS = ("q4k", "q6k", "fp8", "afq4")
"""Groups of 32, of 16, and none; one part and three.  What lanes decode is tested elsewhere, of every type."""
RING = Path(kernels.__file__).parent / "ring.cu"
WARPS = 8
OUTPUTS, INPUTS = 40, 256 * 16
"""Tiles of which the last is not whole, and two passes."""
WIDTHS = (1, 8)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, dict[str, QuantizedTensor]]:
    """Kernels of one and of eight rows of every type, and weights."""
    numbers = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3)).bfloat16()
    weights = {kind: uqff.quantize(numbers, kind) for kind in KINDS}
    stored = {kind: known(weight) for kind, weight in weights.items()}
    common = decoders_source(sorted({each.family for each in stored.values()})) + RING.read_text()
    entries = [
        launching(
            f"{kind}_{columns}", "Product", f"Ring<{each.decoder}, BF16, PairsBF16, {columns}, {WARPS}, 1>::run(given);"
        )
        for kind, each in stored.items()
        for columns in WIDTHS
    ]
    return compiled([common, *entries], tmp_path_factory.mktemp("ring")), weights


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_products(library: tuple[ctypes.CDLL, dict[str, QuantizedTensor]], kind: str, columns: int) -> None:
    """Rows of x of very different sizes; nothing is rounded but the result."""
    weight, generator = library[1][kind], torch.Generator().manual_seed(columns)
    x = torch.randn(columns, INPUTS, generator=generator) * torch.logspace(-30, 30, columns)[:, None]
    x, y = x.bfloat16(), torch.full((columns, OUTPUTS), 7.0).bfloat16()
    given = kernels.FusedProduct(
        weight=kernels.Weight.of(known(weight), weight.numel),
        row_bytes=row_bytes(weight),
        x=x.data_ptr(),
        y=y.data_ptr(),
        rows=OUTPUTS,
        inputs=INPUTS,
        columns=columns,
        share=1,
        count=1,
    )
    width = next(each for each in WIDTHS if columns <= each)
    Compiled(library[0][f"{kind}_{width}"]).launch((2, 1), 32 * WARPS + 32, given)
    expected = x.double() @ weight._dequantize().double().T
    least = 3e-5 * expected.square().mean(dim=1, keepdim=True).sqrt()
    assert bool(((y.double() - expected).abs() <= 2**-8 * expected.abs() + least).all())
