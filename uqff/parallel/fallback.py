"""Layers for slices that a family cannot cut, because they would begin or end within a block or group.

::

    NarrowedLayer     all of W      y_r = (x Wᵀ + b)_r                               no communication
    GatheringLayer    outputs of W  y = gather_r(gather_r(x_r) W_rᵀ + b_r)           two gathers
    GatheredLayer     all of W      y = gather_r(x_r) Wᵀ + b                         one gather

The first stands in for a :class:`~uqff.parallel.ColumnParallelLayer`, the others for a
:class:`~uqff.parallel.RowParallelLayer`, of which the former still holds a share of the weight only.  A ggml K quant,
for one, has blocks of 256 inputs: a row of 512 cannot be cut in four.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from uqff.parallel.accept import check_activations
from uqff.parallel.comm import Comm
from uqff.parallel.linear import ColumnParallelLayer, DistributedKind, ReplicatedLayer, RowParallelLayer
from uqff.parallel.loading import load
from uqff.parallel.shard import Shard, Slice

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.families import QuantizedTensor
    from uqff.parallel.layer import QuantizedLinear
    from uqff.parallel.unloaded import Unloaded

__all__ = ["GatheredLayer", "GatheringLayer", "NarrowedLayer", "column", "every_rank_can", "row"]


class NarrowedLayer(ReplicatedLayer):
    """Every rank holds the whole weight and gives its own outputs only."""

    kind = DistributedKind.COLUMN_PARALLEL
    kept: Slice

    @classmethod
    def narrowed(cls, source: Unloaded, kept: Slice, comm: Comm) -> NarrowedLayer:
        """A layer that gives the outputs ``kept``."""
        made = load(cls, source, comm)
        made.kept = kept
        return made

    def _changed(self, weight: QuantizedTensor, bias: torch.Tensor | None) -> Self:
        made = super()._changed(weight, bias)
        made.kept = self.kept
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All inputs ``[..., in]`` to this rank's outputs."""
        return super().forward(x).narrow(-1, self.kept.start, self.kept.length)


class GatheringLayer(ColumnParallelLayer):
    """Each rank holds some outputs; takes this rank's inputs, gives all outputs on every rank."""

    kind = DistributedKind.ROW_PARALLEL

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs of this rank ``[..., in / ranks]`` to all outputs, the same on every rank."""
        check_activations(x, layer=self.key)
        whole = self.comm.sum_gradients(self.comm.gather_last(x))
        return self.comm.gather_last(super().forward(whole))


class GatheredLayer(ReplicatedLayer):
    """Every rank holds the whole weight; takes this rank's inputs, gives all outputs on every rank."""

    kind = DistributedKind.ROW_PARALLEL

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs of this rank ``[..., in / ranks]`` to all outputs."""
        check_activations(x, layer=self.key)
        return super().forward(self.comm.gather_last(x))


def column(source: Unloaded, comm: Comm, shard: Shard | None = None) -> Callable[[], QuantizedLinear]:
    """What loads a layer that gives this rank's outputs, out of whatever the family can cut.

    Args:
        source: the whole.
        comm: the ranks.
        shard: the rank's outputs; the equal part if None.

    Raises:
        ShardError: the outputs do not divide.
    """
    shard = shard or Shard.simple(0, comm.rank, comm.world_size)
    if every_rank_can(source.weight, shard, comm):
        return partial(load, ColumnParallelLayer, source, comm, shard=shard)
    return partial(NarrowedLayer.narrowed, source, shard.resolve(source.weight.shape, layer=source.key), comm)


def row(source: Unloaded, comm: Comm) -> Callable[[], QuantizedLinear]:
    """What loads a layer that takes this rank's inputs and gives all outputs, out of whatever the family can cut.

    Raises:
        ShardError: the inputs do not divide.
    """
    weight = source.weight
    Shard.simple(1, comm.rank, comm.world_size).resolve(weight.shape, layer=source.key)
    if every_rank_can(weight, Shard.simple(1, comm.rank, comm.world_size), comm):
        return partial(load, RowParallelLayer, source, comm)
    if weight.shape[0] % comm.world_size == 0 and every_rank_can(weight, Shard.simple(0, 0, comm.world_size), comm):
        return partial(load, GatheringLayer, source, comm)
    return partial(load, GatheredLayer, source, comm)


def every_rank_can(weight: QuantizedTensor, shard: Shard, comm: Comm) -> bool:
    """Whether all ranks can cut their slice: they have to agree on the collectives of a layer."""
    if shard.rank is None:
        slices = {shard.resolve(weight.shape)}
        dim, _, length = next(iter(slices))
        slices |= {Slice(dim, start, length) for start in range(0, weight.shape[dim], length)}
    else:
        slices = {
            Shard.simple(shard.dim, rank, comm.world_size).resolve(weight.shape) for rank in range(comm.world_size)
        }
    return all(slice_.length == weight.shape[slice_.dim] or weight.can_narrow(*slice_) for slice_ in slices)
