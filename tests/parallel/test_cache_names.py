"""`generate` with models of old and new transformers, which call the cache otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from uqff.parallel.generate import generate


class Model(torch.nn.Module):
    """The next token is the sum of all so far, which only the cache knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def step(self, ids: torch.Tensor, before: Any) -> tuple[torch.Tensor, int]:
        """Logits of the next token, and what to remember."""
        total = int(ids.sum()) + (before or 0)
        return torch.nn.functional.one_hot(torch.tensor([[total]]), 64).float(), total


class Old(Model):
    """Up to transformers 5.23."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        assert use_cache
        logits, total = self.step(input_ids, past_key_values)
        return SimpleNamespace(logits=logits, past_key_values=total)


class New(Model):
    """From 5.24 on; the old name is a warning there, and an error in the end."""

    def forward(self, input_ids: torch.Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        assert use_cache
        logits, total = self.step(input_ids, cache)
        return SimpleNamespace(logits=logits, cache=total)


@pytest.mark.parametrize("model", [Old, New])
def test_either_name_is_given_and_taken(model: type[Model]) -> None:
    """Each step gets one token and what came before it."""
    assert generate(model(), [1, 2, 3], 3).ids == [6, 12, 24]
