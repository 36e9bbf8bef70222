"""Rows of activations put in order for matrix instructions, by a kernel compiled as plain C++."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from tests.gpu.compiled import Compiled, compiled, launching, needs_compiler
from uqff.gpu import kernels
from uqff.gpu.source import decoders_source

pytestmark = needs_compiler

SPREAD = Path(kernels.__file__).parent / "spread.cu"
ORDERS = {"EvenOdd": False, "Halves": False, "FourApart": True}
"""Whether the numbers of a lane are to be as its codes are, not as they follow each other."""
COLUMNS, INPUTS = 64, 256
ROWS = 70
"""Two images, of which the second is mostly rows that there are not."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A kernel for every order, and what lanes have of 32 numbers in it."""
    sources = [decoders_source(()) + SPREAD.read_text()]
    for order, settled in ORDERS.items():
        call = f"spread<{order}, {str(settled).lower()}, {COLUMNS}>(given);"
        sources.append(launching(f"spread_{order}", "Spread", call))
        sources.append(f'extern "C" void {order}_of(const u8* x, int t, u32* pairs) {{')
        how = "arrange(x, true, t, pairs)" if settled else "in_order(x, t, pairs)"
        sources.append(f"    {order}::{how};\n}}")
    return compiled(sources, tmp_path_factory.mktemp("spread"))


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_find_the_numbers_that_go_with_their_codes(library: ctypes.CDLL, order: str) -> None:
    """In each step of a matrix instruction, both halves; rows that there are not are zeros."""
    x = torch.arange(1, ROWS * INPUTS + 1).to(torch.int16).view(ROWS, INPUTS)
    image = torch.full((2, INPUTS // 8, COLUMNS, 8), -1, dtype=torch.int16)
    given = kernels.Spread(x.data_ptr(), image.data_ptr(), INPUTS, ROWS)
    grid = INPUTS // kernels.SPREAD, 2 * COLUMNS // kernels.SPREAD_ROWS
    Compiled(library[f"spread_{order}"]).launch(grid, kernels.THREADS, given)
    lanes = torch.empty(4, 2, 2, 2, dtype=torch.int16)  # lane, step, half, number
    for row in (0, 33, 63, 64, 69):
        for run in range(INPUTS // 32):
            numbers = x[row, 32 * run : 32 * run + 32].clone()
            for t in range(4):
                library[f"{order}_of"](ctypes.c_void_p(numbers.data_ptr()), t, ctypes.c_void_p(lanes[t].data_ptr()))
            found = image[row // COLUMNS, 4 * run : 4 * run + 4, row % COLUMNS].view(2, 2, 4, 2)  # step, half, lane
            assert torch.equal(found.permute(2, 0, 1, 3), lanes)
    assert not image[1, :, ROWS - COLUMNS :].any()
