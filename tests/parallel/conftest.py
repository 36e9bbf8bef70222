"""Products whose bits do not depend on the machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from uqff.parallel import product


def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear`` where every sum is rounded once, as if from its exact value.

    Products of two numbers of up to 24 bits are exact in float64. What each sum of two numbers loses is known exactly
    (Knuth's TwoSum) and added to the whole, which has twice the bits of float64 before it is rounded.
    """
    sums = x.detach().double().numpy()[..., None, :] * weight.detach().double().numpy()
    lost = np.zeros(sums.shape[:-1])
    while (count := sums.shape[-1]) > 1:
        a, b, rest = np.split(sums, [count // 2, count // 2 * 2], axis=-1)
        both = a + b
        of_b = both - a
        lost += ((a - (both - of_b)) + (b - of_b)).sum(-1)
        sums = np.concatenate([both, rest], axis=-1)
    y = torch.from_numpy(sums[..., 0] + lost).to(x.dtype)
    return y if bias is None else y + bias


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products are exact before they are rounded, in tests that ask for the same bits of two of them.

    BLAS adds up in another order for a weight that lies at another address (16 bytes decide), for another number of
    rows of x, and on another CPU: its results are equal up to rounding only.  So are those of our own kernels.
    """
    monkeypatch.setattr(product, "DEVICES", {})
    monkeypatch.setattr(torch.nn.functional, "linear", exact_linear)
