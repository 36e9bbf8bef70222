"""Adapters on the layers of a rank: added to the weight, or beside it, with the factors of the rank's slice only.

::

    layer              B [out, r]    A [r, in]
    column-parallel    its rows      all            y_r = x W_rᵀ + (x Aᵀ) B_rᵀ · scale
    row-parallel       all           its columns    y = Σ_r (x_r W_rᵀ + (x_r A_rᵀ) Bᵀ · scale)
    replicated         all           all            y = x Wᵀ + (x Aᵀ) Bᵀ · scale

A row-parallel layer adds up both terms at once: an adapter brings no communication of its own.

Merged, the sum is taken in float32 and rounded once, to the dtype of the weight or a wider one, whatever the number of
adapters; a quantised weight is made anew by :meth:`~uqff.parallel.layer.QuantizedLayer.add_delta_w`, each rank its
slice.  Unmerged, products with the factors are taken in their own dtype, float32 unless the model is cast, and the sum
is rounded to the dtype of the activations.

Authority: peft 0.21, ``tuners/lora/layer.py`` (``Linear.forward``).  mistral.rs v0.8.0, ``mistralrs-quant/src/lora``,
cuts A and B along the same dimension, which is right for neither.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from uqff.errors import ShapeError, UnsupportedError
from uqff.families import Unquant
from uqff.lora.low_rank import LowRank, merged
from uqff.simd.floats import Floats

if TYPE_CHECKING:
    from uqff.parallel.gather import ReplicatedStack
    from uqff.parallel.grouping import ExpertGroups
    from uqff.parallel.layer import QuantizedLayer, QuantizedLinear
    from uqff.parallel.shard import Slice

__all__ = ["ExpertTerms", "LowRankTerms", "adapted", "adapted_stack", "check_merged", "summed"]

_Layer = TypeVar("_Layer", bound="QuantizedLayer")
_Linear = TypeVar("_Linear", bound="QuantizedLinear")
_Stack = TypeVar("_Stack", bound="ReplicatedStack")


class LowRankTerms(torch.nn.Module):
    """What adapters that are not merged add to the product of a layer."""

    def __init__(self, deltas: Sequence[LowRank], device: torch.device | str | None = None) -> None:
        """The factors of a slice.

        Args:
            deltas: in order, all of one shape.
            device: where they go.
        """
        super().__init__()
        self.scales = [delta.scale for delta in deltas]
        for at, delta in enumerate(deltas):
            for name, factor in zip("ba", delta.factors, strict=True):
                self.register_buffer(f"{name}{at}", torch.tensor(factor, device=device))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A product with the terms added, in its dtype.

        Args:
            x: ``[..., in]``.
            y: ``[..., out]``.
        """
        total = y
        for at, scale in enumerate(self.scales):
            a, b = self.get_buffer(f"a{at}"), self.get_buffer(f"b{at}")
            inner = torch.nn.functional.linear(x.to(a.dtype), a)
            total = total + torch.nn.functional.linear(inner, b) * scale
        return total.to(y.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return ", ".join(f"rank {self.get_buffer(f'a{at}').shape[0]}" for at in range(len(self.scales)))


class ExpertTerms(torch.nn.Module):
    """:class:`LowRankTerms` of the experts of a stack."""

    def __init__(self, deltas: Mapping[int, Sequence[LowRank]], device: torch.device | str | None = None) -> None:
        """The factors of a slice.

        Args:
            deltas: of each expert that has any.
            device: where they go.
        """
        super().__init__()
        self.experts = torch.nn.ModuleDict({str(at): LowRankTerms(each, device) for at, each in deltas.items()})

    def forward(self, x: torch.Tensor, y: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
        """Products with the terms added.

        Args:
            x: ``[tokens, 1 or experts_per_token, in]``.
            y: ``[tokens, experts_per_token, out]``.
            groups: which experts the tokens go to.
        """
        total = y.reshape(-1, y.shape[-1]).clone()
        for expert, places, rows in groups.rows(x):
            if str(expert) in self.experts:
                total[places] = self.experts[str(expert)](rows, total[places])
        return total.view(y.shape)


def check_merged(layer: QuantizedLayer) -> None:
    """Refuse to write a layer that has adapters beside its weight.

    Raises:
        UnsupportedError: it has.
    """
    if layer.lora is not None:
        raise UnsupportedError(
            "layer has adapters that are not merged", layer=layer.key, expected="merged ones", got=repr(layer.lora)
        )


def adapted(
    layer: _Linear, deltas: Sequence[LowRank], *, merge: bool | None = None, dtype: torch.dtype | None = None
) -> _Linear:
    """A layer with adapters.

    Args:
        layer: a rank's slice, or the whole; not modified.
        deltas: for the whole weight ``[out, in]``, in order.
        merge: whether they are added to the weight; if None, to one that is not quantised.
        dtype: that the sum with such a weight keeps, if it is a wider one than the weight's.

    Raises:
        ShapeError: a delta does not fit the whole weight.
        FormatError: the sum is not finite.
        UnsupportedError: a weight that takes no delta (HQQ, MXFP4) is to be merged.

    >>> import torch
    >>> from uqff.parallel import ColumnParallelLayer, Shard, adapted
    >>> layer = ColumnParallelLayer(uqff.quantize(torch.eye(256), "q8_0"), shard=Shard.simple(0, rank=0, world_size=2))
    >>> with uqff.lora.open_adapter("adapter") as adapter:
    ...     layer = adapted(layer, [adapter["model.layers.0.mlp.up_proj"]])
    >>> layer(torch.ones(1, 256)).shape, layer.lora
    (torch.Size([1, 128]), LowRankTerms(rank 2))
    """
    if not deltas:
        return layer
    parts = [_part(delta, layer, layer.cut) for delta in deltas]
    if merge is False or (merge is None and not layer.weight.UNQUANTISED):
        return _beside(layer, LowRankTerms(parts, layer.weight.device))
    if layer.weight.UNQUANTISED:
        return _with_plain(layer, lambda plain: summed(plain, parts, layer=layer.key, dtype=dtype))
    return layer.add_delta_w(summed(torch.zeros(layer.weight.shape), parts, layer=layer.key))


def adapted_stack(
    stack: _Stack,
    deltas: Mapping[int, Sequence[LowRank]],
    *,
    merge: bool | None = None,
    dtype: torch.dtype | None = None,
) -> _Stack:
    """Stacked experts with adapters.

    Args:
        stack: a rank's slice, or the whole; not modified.
        deltas: of each expert that has any, for its whole matrix ``[out, in]``, in order.
        merge: as for :func:`adapted`.
        dtype: likewise.

    Raises:
        UqffError: see :func:`adapted`.

    >>> import torch
    >>> from uqff.parallel import ReplicatedStack, adapted_stack
    >>> stack = ReplicatedStack(torch.ones(4, 256, 256))
    >>> with uqff.lora.open_adapter("adapter") as adapter:
    ...     stack = adapted_stack(stack, {2: [adapter["model.layers.0.mlp.up_proj"]]})
    >>> stack.weight.shape
    (4, 256, 256)
    """
    if not deltas:
        return stack
    cut = stack.cut._replace(dim=stack.cut.dim - 1)
    parts = {at: [_part(delta, stack, cut) for delta in each] for at, each in deltas.items()}
    if merge is False or (merge is None and not stack.weight.UNQUANTISED):
        return _beside(stack, ExpertTerms(parts, stack.weight.device))

    def total(plain: torch.Tensor) -> torch.Tensor:
        made = plain.to(_wider(plain.dtype, dtype), copy=True)
        for at, each in parts.items():
            made[at] = summed(plain[at], each, layer=stack.key, dtype=dtype)
        return made

    if stack.weight.UNQUANTISED:
        return _with_plain(stack, total)
    return stack.add_delta_w(total(torch.zeros(stack.weight.shape)))


def _part(delta: LowRank, layer: QuantizedLayer, cut: Slice) -> LowRank:
    """The factors of the slice that a layer holds of each matrix."""
    out, inputs = layer.weight.shape[-2:]
    whole = [out, inputs] if layer._whole is None else list(layer._whole.shape[-2:])
    if layer._whole is None and cut.dim >= 0:
        whole[cut.dim] = max(delta.shape[cut.dim], cut.start + cut.length)
    if list(delta.shape) != whole:
        raise ShapeError(
            "delta does not fit the weight",
            layer=layer.key,
            field=delta.origin or None,
            expected=whole,
            got=list(delta.shape),
        )
    return delta if cut.dim < 0 or cut.length == whole[cut.dim] else delta.narrow(*cut)


def summed(
    plain: torch.Tensor, deltas: Sequence[LowRank], *, layer: str | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A matrix with deltas added in float32 and rounded once, to its own dtype or a wider one.

    Raises:
        UqffError: see :func:`uqff.lora.merged`.
    """
    if plain.dtype is torch.float64:  # which deltas are not made for
        for delta in deltas:
            plain = plain + torch.from_numpy(delta.delta())
        return plain
    total = merged(Floats.of_tensor(plain.detach().cpu().contiguous()), deltas, layer=layer)
    return torch.from_numpy(total.bits.view(np.float32)).to(plain.device, _wider(plain.dtype, dtype))


def _wider(own: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    return own if other is None else torch.promote_types(own, other)


def _with_plain(layer: _Layer, change: Callable[[torch.Tensor], torch.Tensor]) -> _Layer:
    """A layer that is not quantised with other numbers."""
    plain = layer.weight.plain
    assert plain is not None
    return layer._changed(Unquant.of(change(plain.tensor())), layer.bias)


def _beside(layer: _Layer, terms: LowRankTerms | ExpertTerms) -> _Layer:
    """A layer of the same weight with terms beside it."""
    check_merged(layer)
    made = copy.copy(layer)
    made._modules = dict(layer._modules)
    made.lora = terms
    return made
