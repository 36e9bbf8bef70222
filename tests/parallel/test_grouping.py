"""Tokens grouped by expert: once, in one place, and only if somebody asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import uqff
from uqff.parallel import ReplicatedStack
from uqff.parallel.gather import group_by_expert
from uqff.parallel.grouping import ExpertGroups

INDICES = torch.tensor([[2, 0], [0, 2], [3, 3]])


class Reads(TorchDispatchMode):
    """Counts what waits for a device: numbers that Python gets of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_rows_of_each_expert() -> None:
    """Experts in ascending order, their places in that of the tokens; shared and own activations alike."""
    for x in (torch.arange(3.0).view(3, 1, 1), torch.arange(6.0).view(3, 2, 1)):
        found = {e: (p.tolist(), r.flatten().tolist()) for e, p, r in ExpertGroups(INDICES, 5).rows(x)}
        given = x.expand(3, 2, 1).flatten().tolist()
        places = {0: [1, 2], 2: [0, 3], 3: [4, 5]}
        assert found == {e: (at, [given[i] for i in at]) for e, at in places.items()}


def test_nothing_is_grouped_that_nobody_asks_for() -> None:
    """The check of the indices takes one read; a stack that kernels multiply needs no groups."""
    with Reads() as reads:
        groups = group_by_expert(INDICES, 4)
    assert reads.count <= 1
    stack = ReplicatedStack(uqff.quantize(torch.randn(4, 8, 64), "q8_0"))
    stack.gather_partial(torch.randn(3, 1, 64), groups)
    assert "_order" not in vars(groups)


@pytest.mark.parametrize(("indices", "bad"), [([[0, 4]], 4), ([[-1, 2]], -1)])
def test_no_such_expert(indices: list[list[int]], bad: int) -> None:
    """The first that there is not is named."""
    with pytest.raises(uqff.UqffError, match=rf"no such expert.*got {bad}"):
        group_by_expert(torch.tensor(indices), 4)
