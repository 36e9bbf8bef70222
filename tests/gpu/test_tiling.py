"""Which kernel of a GPU makes a product: the rules as they were measured."""

from __future__ import annotations

import pytest

from uqff.families.hqq import gpu_tiling
from uqff.gpu.tiling import FEW, Tiling, chosen, ring, widest

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


@pytest.mark.parametrize(("capability", "rows"), [(AMPERE, 16), ((8, 9), 16), (HOPPER, 256), (BLACKWELL, 64)])
def test_how_many_rows_are_multiplied_from_the_codes(capability: tuple[int, int], rows: int) -> None:
    """Instructions of clusters and of warpgroups are asked of no GPU that lacks them."""
    assert widest(capability) == rows
    for columns in range(1, rows + 1):
        found = chosen(capability, 14336, 4096, columns)
        assert found is None if capability < (9, 0) else found is not None or columns == 1
        assert found is None or not found.wide or capability == HOPPER


@pytest.mark.parametrize(
    ("outputs", "columns", "expected"),
    [
        (14336, 1, None),
        (14336, 8, Tiling(8, 4, 2, 6)),
        (14336, 16, Tiling(16, 4, 2, 4)),
        (14336, 32, Tiling(32, 16, 2, 1, wide=True)),
        (14336, 33, Tiling(64, 16, 2, 1, wide=True)),
        (14336, 64, Tiling(64, 16, 2, 1, wide=True)),
        (14336, 65, Tiling(128, 8, 1, 1, wide=True)),
        (14336, 129, Tiling(256, 8, 1, 1, wide=True)),
        (4096, 8, None),
        (4096, 9, Tiling(16, 4, 2, 4)),
        (4096, 17, Tiling(32, 4, 4, 4, wide=True, unit=128)),
        (4096, 64, Tiling(64, 4, 4, 4, wide=True, unit=128)),
        (4096, 128, Tiling(128, 4, 2, 1, wide=True)),
        (4096, 129, None),
        (4095, 16, None),
        (4095, 64, None),
    ],
)
def test_the_rule_on_the_gpu_that_was_measured(outputs: int, columns: int, expected: Tiling | None) -> None:
    """Few outputs are shared by more blocks, and left to other kernels where that is not enough."""
    assert chosen(HOPPER, outputs, 4096, columns) == expected


def test_the_rule_knows_types() -> None:
    """Short weights leave room for more inputs; where scales are little work, products are made by other kernels."""
    assert chosen(HOPPER, 14336, 4096, 32, "Q4K", 4.5) == Tiling(32, 4, 2, 4, wide=True, unit=128)
    assert chosen(HOPPER, 14336, 4096, 64, "Q4K", 4.5) == Tiling(64, 4, 2, 4, wide=True, unit=128)
    assert chosen(HOPPER, 14336, 4096, 64, "Q5K", 5.5) == Tiling(64, 16, 2, 1, wide=True)
    few = [chosen(HOPPER, 4096, 4096, 64, decoder, 4.5) for decoder in ("Q4K", "Mxfp4")]
    assert few == [Tiling(64, 4, 2, 2, wide=True, unit=128), Tiling(64, 4, 4, 4, wide=True, unit=128)]
    assert [chosen(HOPPER, outputs, 4096, 16, "Mxfp4", 4) for outputs in (4096, 8192)] == [None, Tiling(16, 4, 2, 4)]


@pytest.mark.parametrize(
    ("outputs", "columns", "bits", "expected"),
    [
        (14336, 9, 4, Tiling(32, 8, 2, 2, wide=True)),
        (14336, 64, 4, Tiling(64, 16, 2, 1, wide=True)),
        (14336, 64, 3, Tiling(64, 8, 2, 2, wide=True)),
        (14336, 65, 3, Tiling(128, 8, 1, 1, wide=True, beside=4)),
        (14336, 256, 8, Tiling(256, 8, 1, 1, wide=True, beside=4)),
        (14336, 256, 3, None),
        (14336, 257, 4, None),
        (4096, 32, 4, Tiling(32, 4, 4, 4, wide=True)),
        (4096, 32, 3, Tiling(32, 4, 2, 4, wide=True)),
        (4096, 64, 8, Tiling(64, 4, 4, 3, wide=True)),
        (4096, 64, 3, None),
        (4096, 65, 4, None),
        (4095, 16, 4, None),
    ],
)
def test_the_rule_for_hqq(outputs: int, columns: int, bits: int, expected: Tiling | None) -> None:
    """Neighbouring tiles are written together where there are many rows; codes of three bits are seldom faster."""
    assert gpu_tiling.chosen(HOPPER, outputs, 4096, columns, bits) == expected
    assert gpu_tiling.chosen(BLACKWELL, outputs, 4096, columns, bits) is None


@pytest.mark.parametrize("capability", [AMPERE, HOPPER, BLACKWELL])
def test_blocks_stay_where_that_was_measured(capability: tuple[int, int]) -> None:
    """With one row always, but for one type whose rows are long; with several where each block has work enough."""

    def columns(outputs: int, inputs: int, rows: int, decoder: str = "Q4K") -> int | None:
        found = ring(capability, outputs, inputs, rows, decoder)
        assert found is None or found.ring
        return found and found.columns

    if capability != HOPPER:
        assert columns(14336, 4096, 1) is columns(14336, 4096, 8) is None
        return
    assert columns(16, 256, 1) == columns(4096, 14336, 1) == 1
    assert (columns(4096, 14336, 1, "Mxfp4"), columns(4096, 4096, 1, "Mxfp4")) == (None, 1)
    assert [columns(14336, 4096, rows, "Q3K") for rows in (2, 8, 9)] == [8, 8, None]
    assert [columns(4096, 4096, 8, decoder) for decoder in ("Q4K", "Q3K", "Afq<4, 64, BF16>")] == [8, None, None]
    assert columns(4096, 14336, 8) is columns(2048, 1024, 8) is None


def test_no_block_of_a_cluster_is_without_inputs() -> None:
    """Each has a stage of 256 at least."""
    splits = [found.splits for inputs in (256, 512, 768, 2048) if (found := chosen(HOPPER, 4096, inputs, 32))]
    assert splits == [1, 2, 2, 4]


def test_a_block_has_room_for_rows_up_to_the_number_of_another_kernel() -> None:
    """Products of so many rows are made without rounding the weight."""
    assert all((found := chosen(HOPPER, 8192, 4096, columns)) and not found.wide for columns in range(2, FEW + 1))
