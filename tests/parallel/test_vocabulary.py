"""uqff.parallel.vocabulary: the rows of tokens, of every family."""

from __future__ import annotations

import pytest
import torch

import uqff
from uqff.families import Unquant
from uqff.parallel.vocabulary import rows_of

KINDS = ["q4_0", "q4k", "q8k", "afq4", "f8q8", "fp8", "hqq4", "hqq8", "mxfp4", "unquant"]
"""With a scale a block, a row and a weight, and rows that cannot be put together anew (HQQ)."""


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_all_numbers(kind: str) -> None:
    """In any order, more than once, of any shape, also as many as there are; and none."""
    dense = torch.randn(64, 256)
    weight = Unquant.of(dense) if kind == "unquant" else uqff.quantize(dense, kind)
    values = weight.dequantize(torch.float32)
    for ids in (
        torch.tensor([[5, 0, 63], [5, 5, 1]]),
        torch.arange(63, -1, -1),
        torch.tensor(7),
        torch.empty(0, 2).long(),
    ):
        assert torch.equal(rows_of(weight, ids, torch.float32), values[ids])
    assert rows_of(weight, torch.tensor([3]), torch.bfloat16).dtype == torch.bfloat16
