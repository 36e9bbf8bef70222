"""What layers see of their inputs while a model is calibrated."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.test_experts import HIDDEN, projections, routed, three
from uqff import UnsupportedError
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
