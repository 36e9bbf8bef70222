"""Layers of every family that the tests of parallel layers cut."""

from __future__ import annotations

import torch

import uqff
from uqff import Layer

OUT, INPUTS = 32, 1024

KINDS = ("q4_0", "q4k", "hqq4", "hqq8", "hqq3", "fp8", "afq3", "afq4", "f8q8", "mxfp4", "unquant")
"""Every family, and those types whose slices are made differently."""


def plain(out: int = OUT, inputs: int = INPUTS) -> torch.Tensor:
    """A weight of ordinary size, float32 ``[out, in]``."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(out, inputs, generator=generator) / 50


def activations(dtype: torch.dtype, inputs: int = INPUTS) -> torch.Tensor:
    """Three rows in two leading dimensions, ``[1, 3, in]``."""
    return torch.randn(1, 3, inputs, generator=torch.Generator().manual_seed(6)).to(dtype)


def blob(kind: str, *, bias: bool, version: tuple[int, int, int] = (0, 2, 0)) -> bytes:
    """A blob of :func:`plain`; version 0.2.0 unless another is given."""
    weight = uqff.quantize(plain(), kind)
    return uqff.serialize(Layer(weight, torch.linspace(-1, 1, OUT) if bias else None), version=version)


def bound(x: torch.Tensor, weight: torch.Tensor, world_size: int) -> torch.Tensor:
    """The allowed error of each output: 4 ulp × √world, of the sum of the magnitudes of all terms."""
    magnitude = x.to(torch.float32).abs() @ weight.abs().T + 1
    return 4 * world_size**0.5 * torch.finfo(x.dtype).eps * magnitude
