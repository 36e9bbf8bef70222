"""Layers of every family that the tests of parallel layers cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch

import uqff
from uqff import Layer, QuantizedTensor
from uqff.families import stack
from uqff.families.gguf.blocks import block_type_of_kind

OUT, INPUTS = 32, 1024

KINDS = ("q4_0", "q4k", "hqq4", "hqq8", "hqq3", "fp8", "afq3", "afq4", "f8q8", "mxfp4", "unquant")
"""Every family, and those types whose slices are made differently."""

FAMILIES = ("q4k", "hqq4", "fp8", "afq4", "f8q8", "mxfp4", "unquant")
"""One type of each."""

EXPERTS, HIDDEN = 4, 64


Projection = TypeVar("Projection")


def three(projections: Iterable[Projection]) -> tuple[Projection, Projection, Projection]:
    """Gate, up and down, to be given one by one."""
    gate, up, down = projections
    return gate, up, down


def dimensions(world_size: int) -> tuple[int, int]:
    """Outputs and inputs that ranks can share: blocks of 256 inputs, and rows for each."""
    return {3: (48, 768), 8: (32, 2048)}.get(world_size, (OUT, INPUTS))


def plain(out: int = OUT, inputs: int = INPUTS) -> torch.Tensor:
    """A weight of ordinary size, float32 ``[out, in]``."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(out, inputs, generator=generator) / 50


def activations(dtype: torch.dtype, inputs: int = INPUTS) -> torch.Tensor:
    """Three rows in two leading dimensions, ``[1, 3, in]``."""
    return torch.randn(1, 3, inputs, generator=torch.Generator().manual_seed(6)).to(dtype)


def blob(kind: str, *, bias: bool, version: tuple[int, int, int] = (0, 2, 0), world_size: int = 1) -> bytes:
    """A blob of :func:`plain`; version 0.2.0 unless another is given."""
    out, inputs = dimensions(world_size)
    # Three ranks share the rows of HQQ's matrix if there are 96.
    group_size = 96 if world_size == 3 and kind.startswith("hqq") else None
    weight = uqff.quantize(plain(out, inputs), kind, group_size=group_size)
    return uqff.serialize(Layer(weight, torch.linspace(-1, 1, out) if bias else None), version=version)


def bound(x: torch.Tensor, weight: torch.Tensor, world_size: int) -> torch.Tensor:
    """The allowed error of each output: 4 ulp × √world, of the sum of the magnitudes of all terms."""
    magnitude = x.to(torch.float32).abs() @ weight.abs().T + 1
    return 4 * world_size**0.5 * torch.finfo(x.dtype).eps * magnitude


def rounding(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """How far ``x Wᵀ + b`` may be from the exact one, in whatever order its terms are added up, fused or not.

    γ of the sum of the magnitudes of all terms, γ = n u / (1 − n u) for n terms (Higham, *Accuracy and Stability of
    Numerical Algorithms*, 2nd edition, §3.1); halves are added up in float32, then rounded, as is the sum with b.
    """
    magnitude = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    terms = (x.shape[-1] + 1) * torch.finfo(torch.float32).eps / 2
    ends = 0.0 if x.dtype is torch.float32 else torch.finfo(x.dtype).eps
    return magnitude * ((1 + terms / (1 - terms)) * (1 + ends) - 1) + torch.finfo(x.dtype).tiny


def stacked(kind: str, shape: tuple[int, int, int], seed: int = 0) -> QuantizedTensor:
    """Stacked experts ``[experts, out, in]``; MXFP4 is quantised one by one, as no engine does it otherwise."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 10
    return stack([uqff.quantize(each, kind) for each in values]) if kind == "mxfp4" else uqff.quantize(values, kind)


def projections(kind: str, world_size: int = 1, seed: int = 0) -> list[QuantizedTensor]:
    """Gate, up and down of experts whose intermediate dimension ranks can share, in whole blocks."""
    block_type = block_type_of_kind(kind)
    unit = block_type.block_size if block_type is not None else HIDDEN
    hidden, inner = max(unit, HIDDEN), max(unit, HIDDEN) * world_size
    shapes = [(EXPERTS, inner, hidden), (EXPERTS, inner, hidden), (EXPERTS, hidden, inner)]
    return [stacked(kind, shape, seed + i) for i, shape in enumerate(shapes)]


def routed(dtype: torch.dtype, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six tokens of two experts each: one expert has no tokens, one token has the same expert twice."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(6, hidden, generator=generator).to(dtype)
    indices = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 3], [0, 1], [1, 3]])
    return x, indices, torch.rand(6, 2, generator=generator)
