"""Products with many rows of activations, compiled as plain C++: whole blocks of threads run, one after the other."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

import uqff
from tests.gpu.compiled import Compiled, compiled, known, launching, needs_compiler
from tests.gpu.test_hqq_product import record as hqq
from tools.bench.bits import same_bits
from uqff import QuantizedTensor
from uqff.gpu import kernels
from uqff.gpu.source import decoders_source, spread_body

pytestmark = needs_compiler

KINDS = ("afq4", "q6k", "mxfp4", "fp8")
"""Scaled in pairs and in float32, rows at any even address, one part and three."""
BITS = (1, 2, 3, 4, 8)
GPU = Path(kernels.__file__).parent
COLUMNS, WARPS, UNIT = 32, 8, 128
OUTPUTS, INPUTS = 192, 256 * 5
"""Tiles of which the last is half of one, and slots of inputs that are used twice."""
WIDE = """
struct Wide {
    template <int COUNT>
    static void mma(float (&sums)[COUNT], u32 a0, u32 a1, u32 a2, u32 a3, u64 matrix) {
        mma_wide(sums, a0, a1, a2, a3, matrix);
    }
};
"""


def weights() -> dict[str, QuantizedTensor]:
    """Of every kind, by its name."""
    numbers = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3)).bfloat16()
    made = {kind: uqff.quantize(numbers, kind) for kind in KINDS}
    return {**made, **{f"hqq{bits}": hqq(bits, 0, (OUTPUTS, INPUTS)) for bits in BITS}}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, dict[str, QuantizedTensor]]:
    """Kernels that put rows in order and that multiply, of every type, and weights."""
    made = weights()
    stored = {kind: known(weight) for kind, weight in made.items()}
    families = sorted({each.family for each in stored.values()})
    files = (decoders_source(families), *((GPU / name).read_text() for name in ("spread.cu", "tile.cu")))
    entries = [WIDE + (GPU / "wide.cu").read_text()]
    for kind, each in stored.items():
        body = f"multiply_wide<{each.decoder}, PairsBF16, {COLUMNS}, {WARPS}, 1, 1, {UNIT}>(given);"
        entries.append(launching(f"{kind}_product", "Product", body))
        entries.append(launching(f"{kind}_spread", "Spread", spread_body(each.decoder, "PairsBF16", COLUMNS, "given")))
    return compiled(["".join(files), *entries], tmp_path_factory.mktemp("wide")), made


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("kind", [*KINDS, *(f"hqq{bits}" for bits in BITS)])
def test_products(library: tuple[ctypes.CDLL, dict[str, QuantizedTensor]], kind: str, rows: int) -> None:
    """As with weights that are rounded once; rows of x and outputs that no tile ends with."""
    functions, made = library
    weight, stored = made[kind], known(made[kind])
    x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows)).bfloat16()
    across = -(-rows // COLUMNS)
    image, y = torch.full((across * COLUMNS, INPUTS), torch.nan).bfloat16(), torch.full((rows, OUTPUTS), 7.0).bfloat16()
    spread = kernels.Spread(x.data_ptr(), image.data_ptr(), INPUTS, rows)
    grid = INPUTS // kernels.SPREAD, across * COLUMNS // kernels.SPREAD_ROWS
    Compiled(functions[f"{kind}_spread"]).launch(grid, kernels.THREADS, spread)
    given = kernels.FusedProduct(
        weight=kernels.Weight.of(stored, weight.numel),
        row_bytes=tuple(part.nbytes // OUTPUTS for part in stored.parts[: stored.along]),
        x=image.data_ptr(),
        y=y.data_ptr(),
        rows=OUTPUTS,
        inputs=INPUTS,
        columns=rows,
        share=1,
        count=1,
    )
    blocks = -(-OUTPUTS // (kernels.ROWS * WARPS))
    Compiled(functions[f"{kind}_product"]).launch((blocks, across), 32 * WARPS, given)
    numbers = weight._dequantize().double()
    expected, sizes = x.double() @ numbers.T, x.double().abs() @ numbers.abs().T
    # A weight is off by half a unit in its last place, which mostly cancels over the inputs.
    error = (y.double() - expected).abs()
    assert bool((error <= 2**-8 * expected.abs() + 2**-9 * sizes).all())
    assert float(error.norm() / expected.norm()) <= 1.6 * 2e-3
    assert not same_bits(y, torch.full_like(y, 7.0))
