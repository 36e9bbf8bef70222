"""Products on NVIDIA GPUs: by the kernels of :mod:`uqff.gpu`, where they are faster than what they replace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from uqff.gpu import kernels
from uqff.parallel.weight import of_spec, record_of_bytes

__all__ = ["GATHERED", "gather_linear", "linear"]

GATHERED: Final = 64
"""Products of a token with an expert that are made one by one: each reads its weight."""


def linear(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str) -> torch.Tensor | None:
    """See :class:`uqff.parallel.product.Device`."""
    meta = of_spec(spec)
    if not kernels.available(x.device) or x.numel() > kernels.widest(x.device) * meta.shape[-1]:
        return None
    stored = record_of_bytes(meta, parts).stored_on_gpu()
    return None if stored is None else kernels.multiply(stored, x, meta.shape[0])


def gather_linear(
    x: torch.Tensor, indices: torch.Tensor, parts: Sequence[torch.Tensor], spec: str
) -> torch.Tensor | None:
    """See :class:`uqff.parallel.product.Device`."""
    meta = of_spec(spec)
    if indices.numel() > GATHERED or not kernels.available(x.device):
        return None
    stored = record_of_bytes(meta, parts).stored_on_gpu()
    experts, rows, _ = meta.shape
    return None if stored is None else kernels.gather_multiply(stored, x, indices, experts, rows)
