"""Whether two tensors have the same bits."""

from __future__ import annotations

import torch

__all__ = ["same_bits"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of float32, bfloat16 or float16: bit for bit, but that NaNs are alike."""
    bits = torch.int32 if a.dtype is torch.float32 else torch.int16
    nan = a.isnan()
    plain = [each.masked_fill(nan, 0).view(bits) for each in (a, b)]
    return torch.equal(nan, b.isnan()) and torch.equal(*plain)
