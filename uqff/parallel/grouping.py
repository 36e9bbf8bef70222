"""Tokens grouped by the experts that they go to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch

__all__ = ["ExpertGroups"]


class ExpertGroups:
    """Which experts the tokens go to; grouped once somebody asks for the rows of each, which reads the device.

    Attributes:
        indices: experts of each token, int64 ``[tokens, experts_per_token]``, each of one that there is.
        experts: how many there are.
    """

    def __init__(self, indices: torch.Tensor, experts: int) -> None:
        """Nothing is looked at yet."""
        self.indices = indices
        self.experts = experts

    @cached_property
    def _order(self) -> tuple[torch.Tensor, list[int]]:
        """Places in the flattened indices, expert after expert; and how many are each one's."""
        flat = self.indices.reshape(-1)
        counts: list[int] = torch.bincount(flat, minlength=self.experts).tolist()
        return torch.argsort(flat, stable=True), counts

    def rows(self, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Each expert that any token goes to with its places, int64, and the activations there.

        Args:
            x: ``[tokens, 1 or experts_per_token, in]``.
        """
        (order, counts), per_token = self._order, self.indices.shape[1]
        rows, at = x.reshape(-1, x.shape[-1]), 0
        for expert, count in enumerate(counts):
            if count:
                places, at = order[at : at + count], at + count
                yield expert, places, rows[places if x.shape[1] == per_token else places // per_token]
