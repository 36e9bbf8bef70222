"""Rows in another order: of every type whose rows are whole, exactly; of the others, refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import uqff
from uqff.codec.layer import Layer
from uqff.codec.turns import split_gate_up
from uqff.errors import ShapeError, ShardError
from uqff.families import Unquant, stack
from uqff.families.part import Part
from uqff.families.rows import can_reorder, joined_rows, reordered, reordered_bias
from uqff.quantization.types import KINDS, meta_weight

ORDER = np.array([3, 0, 2, 1, 5, 4])
WEIGHT = torch.randn(6, 256, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("hqq")])
def test_rows_change_places_and_nothing_else(kind: str) -> None:
    """The codes are those of the reordered weight; only of FP8 does a number belong to all rows, and it stays."""
    record = uqff.quantize(WEIGHT, kind)
    before = record.dequantize()
    made = reordered(record, ORDER)
    assert made == uqff.quantize(WEIGHT[ORDER], kind)
    assert torch.equal(made.dequantize(), before[ORDER])
    assert torch.equal(record.dequantize(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
def test_plain_rows_and_a_bias(dtype: torch.dtype) -> None:
    """Of any dtype; a bias goes the same way."""
    weight = (WEIGHT * 100).to(dtype)
    assert torch.equal(reordered(Unquant.of(weight), ORDER).weight, weight[ORDER])
    bias = reordered_bias(Part.of_tensor(weight[:, 0]), ORDER)
    assert bias.same_as(Part.of_tensor(weight[:, 0][ORDER]))


def test_sizes_without_bytes() -> None:
    """On the meta device there is nothing to move."""
    made = reordered(meta_weight("q4k", (6, 256), torch.float32), ORDER)
    assert (made.kind, made.shape) == ("q4k", (6, 256))


def test_what_cannot_change_places() -> None:
    """HQQ has groups across rows, F8Q8 blocks unless a row is whole ones, a stack has no rows; the nearest can."""
    unaligned = uqff.quantize(WEIGHT[:, :40], "f8q8")
    for weight in (uqff.quantize(WEIGHT, "hqq8"), unaligned, Unquant.of(WEIGHT.view(2, 3, 256))):
        assert not can_reorder(weight)
        with pytest.raises(ShardError, match="rows cannot change places exactly"):
            reordered(weight, ORDER)
    assert can_reorder(uqff.quantize(WEIGHT[:, :32], "f8q8"))
    with pytest.raises(ShapeError, match=r"expected 6, got \[5\]"):
        reordered(Unquant.of(WEIGHT), ORDER[:5])
    with pytest.raises(ShapeError, match="order of another number of rows"):
        reordered_bias(Part.of_tensor(WEIGHT[:, 0]), ORDER[:5])


@pytest.mark.parametrize("kind", ["q4k", "q8_0", "mxfp4", "afq4", "unquant"])
def test_rows_of_several_weights(kind: str) -> None:
    """Of weights and of their stacks: one after the other, and in turns; no code is touched, and both come apart."""
    ones = [uqff.quantize(WEIGHT + at, kind) for at in range(2)]
    whole = joined_rows(ones, turns=False)
    assert [whole.narrow(0, 0, 6), whole.narrow(0, 6, 6)] == ones
    stacks = [stack([each, each]) for each in ones]
    turned = joined_rows(stacks, turns=True)
    assert torch.equal(turned.dequantize()[:, 0::2], stacks[0].dequantize())
    assert [each.weight for each in split_gate_up(Layer(turned))] == stacks


def test_weights_that_cannot_be_put_together() -> None:
    """Of two types, of two shapes, with one scale each that differs, or with groups across rows."""
    with pytest.raises(ShardError, match="got q4k, q8_0"):
        joined_rows([uqff.quantize(WEIGHT, kind) for kind in ("q4k", "q8_0")], turns=True)
    with pytest.raises(ShapeError, match="weights of several shapes"):
        joined_rows([uqff.quantize(each, "q8_0") for each in (WEIGHT, WEIGHT[:5])], turns=True)
    with pytest.raises(ShardError, match="the same in all"):
        joined_rows([uqff.quantize(each, "fp8") for each in (WEIGHT, 2 * WEIGHT)], turns=True)
    with pytest.raises(ShardError, match="got hqq8, hqq8"):
        joined_rows([uqff.quantize(WEIGHT, "hqq8")] * 2, turns=True)
