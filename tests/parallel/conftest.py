"""Products whose bits do not depend on the machine."""

from __future__ import annotations

import math

import pytest
import torch

from uqff.parallel import product


def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear`` where every sum is rounded once, from its exact value.

    Products of two numbers of up to 24 bits are exact in float64, and ``math.fsum`` adds those up exactly.
    """
    terms = x.detach().double()[..., None, :] * weight.detach().double()
    sums = [math.fsum(row) for row in terms.reshape(-1, terms.shape[-1]).tolist()]
    y = torch.tensor(sums, dtype=torch.float64).view(terms.shape[:-1]).to(x.dtype)
    return y if bias is None else y + bias


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products are exact before they are rounded, in tests that ask for the same bits of two of them.

    BLAS adds up in another order for a weight that lies at another address (16 bytes decide), for another number of
    rows of x, and on another CPU: its results are equal up to rounding only.  So are those of our own kernels.
    """
    monkeypatch.setattr(product, "DEVICES", {})
    monkeypatch.setattr(torch.nn.functional, "linear", exact_linear)
