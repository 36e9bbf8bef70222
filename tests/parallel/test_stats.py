"""What layers see of their inputs while a model is calibrated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.test_experts import HIDDEN, projections, routed, three
from uqff import ShapeError, UnsupportedError
from uqff.parallel import FusedExperts, PackedExperts


def test_experts_in_a_list_and_in_a_stack_see_the_same() -> None:
    """Squares and products of every expert's inputs; nothing can be taken before they are watched."""
    experts = PackedExperts.from_layers(*three(each.unstack() for each in projections("q8_0")))
    fused = FusedExperts.from_layers(*three(projections("q8_0")))
    x, indices, weights = routed(torch.float32, HIDDEN)
    for projection in (experts.down_proj, fused.down_proj):
        with pytest.raises(UnsupportedError, match="layer does not track stats"):
            projection.end_track_stats()
        projection.begin_track_stats(products=True)
    experts(x, indices, weights)
    fused(x, indices, weights)
    for one, other in zip(experts.down_proj.take_stats(), fused.down_proj.take_stats(), strict=True):
        assert (one.rows, one.rows > 0) == (other.rows, one.calls > 0)
        assert torch.equal(one.squares, other.squares)
        assert one.products is not None
        assert other.products is not None
        assert torch.equal(one.products, other.products)


def test_experts_in_a_list_are_quantised_by_what_each_saw() -> None:
    """``[experts, in]``, as watching gives it, was refused by each expert; it is what a stack takes."""
    listed = PackedExperts.from_layers(*three(each.unstack() for each in projections("q8_0"))).down_proj
    experts, _, inputs = listed.size()
    importance = torch.rand(experts, inputs, generator=torch.Generator().manual_seed(1))
    for given in (importance, importance.numpy(), importance[0]):
        made = listed.apply_isq("q4_0", imatrix_weight=given, effort="best")
        for expert in range(experts):
            row: Any = given if given.ndim == 1 else given[expert]
            own = listed[expert].apply_isq("q4_0", imatrix_weight=row, effort="best")
            assert torch.equal(made[expert].dequantize_w(), own.dequantize_w())
    with pytest.raises(ShapeError, match="importance"):
        listed.apply_isq("q4_0", imatrix_weight=importance[:-1])
