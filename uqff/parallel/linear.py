"""The linear layers of a model that is partitioned over ranks.

::

    ReplicatedLayer       every rank holds all of W        y = x Wᵀ + b               no communication
    ColumnParallelLayer   a slice of the outputs, and of b y_r = x W_rᵀ + b_r         none; the gradient in x is summed
    RowParallelLayer      a slice of the inputs, all of b  y = Σ_r x_r W_rᵀ + b       one sum over the ranks; none back
    DummyLayer            no weight yet                    an error

How a weight is multiplied is in :mod:`uqff.parallel.product`.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/distributed/layers.rs``.  There no rank cuts a weight that comes
from a UQFF file, and layers of several ranks do not load; here each rank takes its slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, ClassVar

import torch

from uqff.errors import ShapeError, ShardError, UnsupportedError
from uqff.families import QuantizedTensor
from uqff.parallel.accept import Weight, layer_of, parts_of, record_of
from uqff.parallel.comm import Comm
from uqff.parallel.dummy import DummyLayer
from uqff.parallel.from_checkpoint import check_plain, first, linear, merged, unloaded
from uqff.parallel.layer import DistributedKind, QuantizedLinear
from uqff.parallel.shard import Shard, chunk_ranges

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints import Checkpoint
    from uqff.parallel.immediate import ImmediateIsq, PendingLayer, Types

__all__ = ["ColumnParallelLayer", "DistributedKind", "DummyLayer", "ReplicatedLayer", "RowParallelLayer"]


class LinearOfCheckpoint(QuantizedLinear):
    """What the layers share that are made of a checkpoint."""

    NEEDS_BIAS: ClassVar[bool] = False
    """Whether a layer that is to have a bias must have one."""

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        prefix: str,
        comm: Comm | None = None,
        *,
        in_dim: int,
        out_dim: int,
        bias: bool,
        shard: Shard | None = None,
        isq: Types | ImmediateIsq | None = None,
        device: torch.device | str | None = None,
    ) -> Self | DummyLayer | PendingLayer:
        """The slice of a layer of a checkpoint, plain or quantised; only its bytes are read.

        Args:
            checkpoint: of :func:`uqff.open_checkpoint`.
            prefix: path of the layer, ``model.layers.0.mlp.up_proj``.
            comm: the ranks; a world of one if None.
            in_dim: inputs of the whole.
            out_dim: outputs of the whole.
            bias: whether the layer has a bias: one that the checkpoint has is left out if not.
            shard: the slice, if it is not the rank's equal part.
            isq: what it is quantised to, see :func:`~uqff.parallel.from_checkpoint.prepared`.
            device: where the slice goes; it stays a view of the file, where it can be one, if None.

        Returns:
            The layer; a dummy if the checkpoint has nothing of it; a pending one if threads of ``isq`` make it.

        Raises:
            ShapeError: weight or bias have another shape.
            ShardError: the slice cannot be cut exactly; world sizes that work are named.
            MissingError: a companion of the weight is missing; of a replicated layer, a bias that it is to have.
            UqffError: the layer is not valid.
        """
        source = unloaded(checkpoint, prefix, (out_dim, in_dim), bias=bias, must=cls.NEEDS_BIAS)
        return linear(cls, source, prefix, comm, shard=shard, isq=isq, device=device)


class ReplicatedLayer(LinearOfCheckpoint):
    """A layer that every rank holds whole.

    Example:
        >>> import torch
        >>> layer = uqff.parallel.ReplicatedLayer(torch.eye(32), torch.ones(32))
        >>> layer(torch.full((1, 32), 2.0))[0, :3]
        tensor([3., 3., 3.])
        >>> layer.apply_isq("q8_0").weight.kind
        'q8_0'
    """

    NEEDS_BIAS = True

    @classmethod
    def matformer_from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        prefix: str,
        *,
        in_dim: int,
        out_dim: int,
        bias: bool,
        kept_layers_indices: Sequence[int] | torch.Tensor | None,
        orig_num_hidden_layers: int,
    ) -> ReplicatedLayer | DummyLayer:
        """:meth:`new_layers_matformer_indices` of a layer of a plain checkpoint, or of any if all layers are kept.

        Args:
            checkpoint: of :func:`uqff.open_checkpoint`.
            prefix: path of the layer.
            in_dim: inputs.
            out_dim: outputs of the whole.
            bias: whether it has a bias.
            kept_layers_indices: hidden layers to keep; all if None.
            orig_num_hidden_layers: number of hidden layers that the weight has.

        Raises:
            UnsupportedError: the checkpoint is quantised.
            UqffError: see :meth:`from_checkpoint` and :meth:`new_layers_matformer_indices`.
        """
        source = unloaded(checkpoint, prefix, (out_dim, in_dim), bias=bias, must=True)
        if kept_layers_indices is not None:
            check_plain(checkpoint, source)
        weight, held = (None, None) if source is None else source.take(source.whole())
        return cls.new_layers_matformer_indices(weight, held, kept_layers_indices, orig_num_hidden_layers, key=prefix)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear) -> ReplicatedLayer:
        """A layer that shares the memory of a plain one.

        Raises:
            UnsupportedError: this is none.
        """
        if not isinstance(linear, torch.nn.Linear):
            got = type(linear).__name__
            raise UnsupportedError("not a linear layer", expected="a torch.nn.Linear", got=got)
        return cls(linear)

    def _bias_beside(self, weight: QuantizedTensor, bias: torch.Tensor, *, engine_biases: bool) -> torch.Tensor:
        """The bias as it is: the engine's replicated layers leave it to the weight, and cast nothing."""
        return bias

    @classmethod
    def new_layers_matformer_indices(
        cls,
        weight: Weight | None,
        bias: torch.Tensor | None,
        kept_layers_indices: Sequence[int] | torch.Tensor | None,
        orig_num_hidden_layers: int,
        *,
        key: str | None = None,
    ) -> ReplicatedLayer | DummyLayer:
        """Keep the outputs of some hidden layers, out of a weight that has outputs for each.

        Args:
            weight: ``[layers · n, in]``; None gives a :class:`DummyLayer`.
            bias: ``[layers · n]``, of which the same parts are kept in the same order; or, if it has another length,
                one that fits the result. (The engine moves it since 0.9; before, a bias stayed where it was.)
            kept_layers_indices: hidden layers to keep, in order, at least one; all if None.
            orig_num_hidden_layers: number of hidden layers that the weight has.
            key: of the layer, for errors.

        Raises:
            ShardError: the weight has no such parts, or cannot be cut there.
            ShapeError: the bias fits neither.
        """
        if weight is None:
            return DummyLayer(key)
        given, bias = parts_of(weight, bias, layer=key)
        record = record_of(given, layer=key)
        if len(record.shape) != 2:
            raise ShapeError("weight is not a matrix", layer=key, expected="[layers · n, in]", got=list(record.shape))
        if kept_layers_indices is None:
            return cls(record, bias, key=key)
        indices = _kept(kept_layers_indices, orig_num_hidden_layers, key)
        parts = [Shard.simple(0, at, orig_num_hidden_layers).apply_to(record, layer=key) for at in indices]
        n = record.shape[0] // orig_num_hidden_layers
        kept = record.resized(n * len(indices)).join([(n * i, part) for i, part in enumerate(parts)], 0)
        if bias is not None and bias.shape == (record.shape[0],):
            bias = torch.cat([bias[at * n : (at + 1) * n] for at in indices])
        return cls(kept, bias, key=key)


def _kept(indices: Sequence[int] | torch.Tensor, layers: int, key: str | None) -> list[int]:
    expected = f"whole numbers from 0 to {layers - 1}, at least one"
    try:
        kept = [index(each) for each in indices if not isinstance(each, bool)]
    except TypeError:
        kept = []
    if not kept or len(kept) != len(indices) or not 0 <= min(kept) <= max(kept) < layers:
        got = indices.tolist() if isinstance(indices, torch.Tensor) else indices
        raise ShardError("no such hidden layers", layer=key, field="kept_layers_indices", expected=expected, got=got)
    return kept


class ColumnParallelLayer(LinearOfCheckpoint):
    """A layer of which each rank holds some outputs, and their bias; takes all inputs, gives this rank's outputs.

    The gradient in the inputs is added up over the ranks, as each rank's outputs are used on that rank only.

    Example:
        A world of one holds all; a rank of several holds what ``Comm(group)`` says, or a shard.

        >>> import torch
        >>> from uqff.parallel import ColumnParallelLayer, Comm, Shard
        >>> weight = uqff.quantize(torch.eye(64), "q8_0")
        >>> ColumnParallelLayer(weight, comm=Comm()).weight.shape
        (64, 64)
        >>> ColumnParallelLayer(weight, comm=Comm(), shard=Shard.simple(0, rank=1, world_size=4)).weight.shape
        (16, 64)
        >>> paths = uqff.save({"lm_head": weight}, "layer.uqff")
        >>> with uqff.open("layer.uqff") as file:
        ...     layer = ColumnParallelLayer.from_file(file, "lm_head", shard=Shard.offset(0, 0, 16))
        >>> layer
        ColumnParallelLayer(...)
        >>> gate, up = ColumnParallelLayer.new_merged(weight, chunks=2)
        >>> up.weight.shape
        (32, 64)
    """

    kind = DistributedKind.COLUMN_PARALLEL

    @classmethod
    def _shard(cls, comm: Comm) -> Shard:
        return Shard.simple(0, comm.rank, comm.world_size)

    @classmethod
    def new_with_shard(
        cls,
        weight: Weight | None,
        bias: torch.Tensor | None,
        comm: Comm | None,
        shard: Shard,
        *,
        key: str | None = None,
    ) -> ColumnParallelLayer | DummyLayer:
        """:meth:`new` with a shard, like that of :func:`~uqff.parallel.heads.compute_kv_shard`."""
        return cls.new(weight, bias, comm, shard=shard, key=key)

    @classmethod
    def new_merged(
        cls,
        weight: Weight | None,
        bias: torch.Tensor | None = None,
        comm: Comm | None = None,
        *,
        chunks: int | Sequence[int],
        key: str | None = None,
    ) -> list[ColumnParallelLayer | DummyLayer]:
        """One layer for each chunk of a fused weight (query, key and value; gate and up), each cut among the ranks.

        Args:
            weight: the whole, the chunks one after another along the outputs.
            bias: of the whole.
            comm: the ranks.
            chunks: number of equal chunks, or the outputs of each.
            key: of the layer, for errors.
        """
        comm = Comm.of(comm)
        if weight is None:
            return [DummyLayer(key) for _ in range(chunks if isinstance(chunks, int) else len(chunks))]
        whole = layer_of(weight, bias, layer=key)
        ranges = chunk_ranges(whole.weight.shape, chunks, layer=key)
        parts = [Shard.offset(*each).apply_to(whole, layer=key) for each in ranges]
        return [cls.new(part, None, comm, key=key) for part in parts]

    @classmethod
    def merged_from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        prefix: str,
        comm: Comm | None = None,
        *,
        in_dim: int,
        out_dim: int,
        chunks: int | Sequence[int],
        bias: bool,
        isq: Types | ImmediateIsq | None = None,
        device: torch.device | str | None = None,
    ) -> list[ColumnParallelLayer | DummyLayer | PendingLayer]:
        """:meth:`new_merged` of a layer of a checkpoint: of each chunk, the rank's slice.

        Takes and raises what :meth:`from_checkpoint` does.

        Args:
            checkpoint: of :func:`uqff.open_checkpoint`.
            prefix: path of the layer.
            comm: the ranks; a world of one if None.
            in_dim: inputs.
            out_dim: outputs of all chunks.
            chunks: number of equal chunks, or the outputs of each.
            bias: whether the layer has a bias.
            isq: what each is quantised to.
            device: where the slices go.
        """
        source = unloaded(checkpoint, prefix, (out_dim, in_dim), bias=bias)
        return [linear(cls, each, prefix, comm, isq=isq, device=device) for each in merged(source, chunks, prefix)]

    @classmethod
    def matformer_from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        prefix: str,
        comm: Comm | None = None,
        *,
        in_dim: int,
        out_dim: int,
        orig_out_dim: int,
        bias: bool,
        isq: Types | ImmediateIsq | None = None,
        device: torch.device | str | None = None,
    ) -> ColumnParallelLayer | DummyLayer | PendingLayer:
        """:meth:`new_matformer` of a layer of a plain checkpoint: the rank's slice of its first outputs.

        Takes and raises what :meth:`from_checkpoint` does; an error if the checkpoint is quantised.
        """
        source = unloaded(checkpoint, prefix, (orig_out_dim, in_dim), bias=bias)
        return linear(cls, first(source, checkpoint, 0, out_dim), prefix, comm, isq=isq, device=device)

    @classmethod
    def new_matformer(
        cls,
        weight: Weight | None,
        bias: torch.Tensor | None,
        comm: Comm | None,
        out_dim: int,
        *,
        key: str | None = None,
    ) -> ColumnParallelLayer | DummyLayer:
        """The first ``out_dim`` outputs of a larger weight, then this rank's equal part of those."""
        return cls._new_of_first(0, out_dim, weight, bias, comm, key)


class RowParallelLayer(LinearOfCheckpoint):
    """A layer of which each rank holds some inputs; takes this rank's inputs, gives all outputs on every rank.

    The partial products are added up over the ranks, then the bias is added, once.  The gradient in the inputs is that
    of this rank's inputs; the outputs are taken to be used alike on every rank.

    Example:
        >>> import torch
        >>> from uqff.parallel import RowParallelLayer, Shard
        >>> weight = uqff.quantize(torch.eye(64), "q8_0")
        >>> RowParallelLayer(weight)(torch.ones(2, 64)).shape
        torch.Size([2, 64])
        >>> RowParallelLayer(weight, shard=Shard.simple(1, rank=0, world_size=2)).weight.shape
        (64, 32)
    """

    kind = DistributedKind.ROW_PARALLEL

    @classmethod
    def _shard(cls, comm: Comm) -> Shard:
        return Shard.simple(1, comm.rank, comm.world_size)

    @classmethod
    def matformer_from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        prefix: str,
        comm: Comm | None = None,
        *,
        in_dim: int,
        out_dim: int,
        orig_in_dim: int,
        bias: bool,
        isq: Types | ImmediateIsq | None = None,
        device: torch.device | str | None = None,
    ) -> RowParallelLayer | DummyLayer | PendingLayer:
        """:meth:`new_matformer` of a layer of a plain checkpoint: the rank's slice of its first inputs.

        Takes and raises what :meth:`from_checkpoint` does; an error if the checkpoint is quantised.
        """
        source = unloaded(checkpoint, prefix, (out_dim, orig_in_dim), bias=bias)
        return linear(cls, first(source, checkpoint, 1, in_dim), prefix, comm, isq=isq, device=device)

    @classmethod
    def new_matformer(
        cls,
        weight: Weight | None,
        bias: torch.Tensor | None,
        comm: Comm | None,
        in_dim: int,
        *,
        key: str | None = None,
    ) -> RowParallelLayer | DummyLayer:
        """The first ``in_dim`` inputs of a larger weight, then this rank's equal part of those."""
        return cls._new_of_first(1, in_dim, weight, bias, comm, key)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product of all inputs with the weight, plus the bias.

        Args:
            x: this rank's inputs, ``[..., in of the slice]``.

        Returns:
            ``[..., out]`` in the dtype of ``x``, the same on every rank.
        """
        return self._add_bias(self.comm.sum_all_reduce(self._product(x)))
