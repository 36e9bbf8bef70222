"""uqff.codec.turns: gates and ups that take turns, in every kind of row."""

from __future__ import annotations

import pytest
import torch

import uqff
from tests.support.checkpoints import same_bits
from uqff import ShapeError, UnsupportedError
from uqff.codec.layer import Layer
from uqff.codec.turns import split_gate_up
from uqff.families import QuantizedTensor, stack

WEIGHT = torch.randn(2, 6, 256, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", ["q8_0", "fp8", "mxfp4", "unquant"])
def test_whole_rows(kind: str) -> None:
    """Of a stack and of a matrix: the numbers, the bias, and what is known without bytes."""
    experts = [uqff.quantize(each, kind) for each in WEIGHT]
    if kind == "fp8":  # of one scale
        experts = [experts[0], experts[0]]
    weight: QuantizedTensor = stack(experts)
    layer = Layer(weight, torch.arange(12.0).view(2, 6))
    whole = weight.dequantize()
    for at, (half, meta) in enumerate(zip(split_gate_up(layer), split_gate_up(layer.meta()), strict=True)):
        assert same_bits(half.weight.dequantize(), whole[:, at::2])
        assert half.weight.kind == kind
        assert half.bias is not None
        assert torch.equal(half.bias, torch.arange(12.0).view(2, 6)[:, at::2])
        assert meta.weight.shape == half.weight.shape == (2, 3, 256)
    for at, half in enumerate(split_gate_up(Layer(experts[1]))):
        assert same_bits(half.weight.dequantize(), experts[1].dequantize()[at::2])


def test_what_has_none() -> None:
    """HQQ's groups run down through the rows; an odd number of rows."""
    with pytest.raises(UnsupportedError, match="outputs that take turns: expected a type whose rows"):
        split_gate_up(Layer(uqff.quantize(WEIGHT, "hqq8")))
    with pytest.raises(ShapeError, match="outputs do not take turns: expected an even number, got 5"):
        split_gate_up(Layer(uqff.quantize(WEIGHT[0, :5], "unquant")))
