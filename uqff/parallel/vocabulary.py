"""Embedding and head: each rank holds the rows of a part of the vocabulary.

::

    Embedding    rows of W   y = Σ_r (row of the token if it is rank r's, else 0)    one sum; of one number and zeros
    Head         rows of W   y = gather_r(x W_rᵀ)                                    one gather

A vocabulary that does not divide, or a family that cannot cut it there, is whole on every rank, and nothing is
exchanged.  In a tied model of UQFF 1.2 both are the same rows of the same weight, held once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from uqff.errors import ShapeError, UnsupportedError
from uqff.parallel.fallback import every_rank_can
from uqff.parallel.linear import ColumnParallelLayer, DistributedKind, ReplicatedLayer
from uqff.parallel.loading import load
from uqff.parallel.shard import Shard
from uqff.parallel.weight import dequantize, record_of_bytes, to_spec

if TYPE_CHECKING:
    from uqff.families import QuantizedTensor
    from uqff.parallel.comm import Comm
    from uqff.parallel.layer import QuantizedLinear
    from uqff.parallel.unloaded import Unloaded

__all__ = ["Embedding", "Head", "RowsOnDemand", "rows_of", "vocabulary"]


def vocabulary(source: Unloaded, comm: Comm) -> Callable[[], QuantizedLinear]:
    """What loads the rows of this rank of an embedding or a head ``[vocabulary, hidden]``."""
    shard = Shard.simple(0, comm.rank, comm.world_size)
    divides = source.weight.shape[0] % comm.world_size == 0
    if comm.world_size > 1 and divides and every_rank_can(source.weight, shard, comm):
        return partial(load, ColumnParallelLayer, source, comm)
    return partial(load, ReplicatedLayer, source, comm)


class Head(torch.nn.Module):
    """Hidden states to logits: the whole vocabulary, the same on every rank."""

    def __init__(self, rows: QuantizedLinear, bias: torch.nn.Parameter | None = None) -> None:
        """A head.

        Args:
            rows: this rank's.
            bias: of the whole vocabulary, if the rows have none of their own, as those of an embedding.
        """
        super().__init__()
        self.rows, self.bias = rows, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` to ``[..., vocabulary]``."""
        y: torch.Tensor = self.rows(x)
        y = y if _is_whole(self.rows) else self.rows.comm.gather_last(y)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Embedding(torch.nn.Module):
    """Token ids to hidden states; only the rows of the tokens at hand are dequantised."""

    def __init__(
        self,
        rows: QuantizedLinear,
        dtype: torch.dtype,
        scale: float | None = None,
        norm: torch.nn.Module | None = None,
    ) -> None:
        """An embedding.

        Args:
            rows: this rank's.
            dtype: of the hidden states; follows ``.to(dtype)`` of the model.
            scale: what hidden states are multiplied by, rounded to their dtype; nothing if None.
            norm: what hidden states go through; nothing if None.
        """
        super().__init__()
        self.rows = rows
        self.scale = scale
        self.norm = norm
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=rows.weight.device), persistent=False)
        self.like: torch.Tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids ``[...]`` to hidden states ``[..., hidden]``.

        Raises:
            ShapeError: a token outside the vocabulary.
        """
        hidden = self.numbers(ids)
        if self.scale is not None:
            hidden = hidden * torch.tensor(self.scale, dtype=hidden.dtype)
        return hidden if self.norm is None else self.norm(hidden)

    @property
    def weight(self) -> RowsOnDemand:
        """What models of ``transformers`` look at: the numbers of some rows, their dtype and device."""
        return RowsOnDemand(self)

    def numbers(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of ids ``[...]`` as they are, ``[..., hidden]``; takes and raises what :meth:`forward` does."""
        rows, weight, dtype = self.rows, self.rows.weight, self.like.dtype
        split = not _is_whole(rows)
        count = weight.shape[0]
        first = count * rows.comm.rank if split else 0
        total = count * rows.comm.world_size if split else count
        if ids.numel() == 1 and not split:  # as every token of an answer is
            token = int(ids)
            if not 0 <= token < total:
                raise ShapeError("token outside the vocabulary", layer=rows.key, expected=f"0 to {total - 1}", got=ids)
            return _rows(weight, [token], dtype).to(ids.device).view(*ids.shape, -1)
        tokens, inverse = torch.unique(ids, return_inverse=True)
        if tokens.numel() and not 0 <= int(tokens[0]) <= int(tokens[-1]) < total:
            raise ShapeError("token outside the vocabulary", layer=rows.key, expected=f"0 to {total - 1}", got=tokens)
        held = (tokens >= first) & (tokens < first + count)
        found = torch.zeros(len(tokens), weight.shape[1], dtype=dtype, device=ids.device)
        found[held] = _rows(weight, (tokens[held] - first).tolist(), dtype).to(ids.device)
        return (rows.comm.sum_all_reduce(found) if split else found)[inverse]

    def lookup(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What gives the hidden states ``[1, 1, hidden]`` of an id ``[1, 1]`` without asking the host about it.

        The id must lie within the vocabulary. None if a row is no run of bytes of each part, or hidden states are
        scaled or normalised.
        """
        weight, count, comm = self.rows.weight, self.rows.weight.shape[0], self.rows.comm
        tables = _tables(weight)
        if tables is None or self.scale is not None or self.norm is not None:
            return None
        spec = to_spec(weight.narrow(0, count - 1, 1).meta())

        def row(index: torch.Tensor) -> torch.Tensor:
            parts = [(table[index] if len(table) == count else table).view(-1) for table in tables]
            made: torch.Tensor = dequantize(parts, spec, self.like.dtype)
            return made.view(1, 1, -1)

        def row_of_a_rank(ids: torch.Tensor) -> torch.Tensor:
            index = ids.view(1) - count * comm.rank
            held = (index >= 0) & (index < count)
            return comm.sum_all_reduce(torch.where(held, row(index.clamp(0, count - 1)), 0.0))

        return (lambda ids: row(ids.view(1))) if _is_whole(self.rows) else row_of_a_rank


class RowsOnDemand:
    """The numbers of an embedding ``[vocabulary, hidden]``, of which rows are dequantised when they are asked for."""

    def __init__(self, embedding: Embedding) -> None:
        self._embedding = embedding

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self._embedding.like.dtype

    @property
    def device(self) -> torch.device:
        """Where they will be."""
        return self._embedding.like.device

    @property
    def shape(self) -> torch.Size:
        """Of all of them."""
        rows = self._embedding.rows
        count, hidden = rows.weight.shape
        return torch.Size((count if _is_whole(rows) else count * rows.comm.world_size, hidden))

    def __getitem__(self, index: Any) -> torch.Tensor:
        """As of a tensor: of one row, that row is dequantised, else all are.

        Raises:
            IndexError: there is no such row.
        """
        first, *others = index if isinstance(index, tuple) else (index,)
        count = self.shape[0]
        one = type(first) is int
        if one and not -count <= first < count:
            raise IndexError(f"row {first} of {count}")
        asked = torch.tensor(first % count) if one else torch.arange(count)
        numbers = self._embedding.numbers(asked.to(self.device))
        return numbers[tuple(others)] if one else numbers[index]


def _is_whole(rows: QuantizedLinear) -> bool:
    return rows.is_distributed() is DistributedKind.REPLICATED


def _tables(weight: QuantizedTensor) -> list[torch.Tensor] | None:
    """The bytes of each part, a row for each of the weight's, or one for all; None if they do not lie so."""
    count = weight.shape[0]
    if weight.alignment(0) != 1:
        return None
    last = weight.narrow(0, count - 1, 1)  # of views, if its bytes lie together
    tables = []
    for part, mine in zip(weight.parts.values(), last.parts.values(), strict=True):
        rows = count if mine.nbytes * count == part.nbytes else 1
        table = part.as_bytes().tensor().view(rows, -1)
        if table[-1].nbytes != mine.nbytes or table[-1].data_ptr() != mine.as_bytes().tensor().data_ptr():
            return None
        tables.append(table)
    return tables


def rows_of(weight: QuantizedTensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some rows as plain numbers, without asking the host which, if they lie as :func:`_tables` has it.

    Args:
        weight: ``[rows, in]``.
        ids: int64 ``[...]``, of rows that there are.
        dtype: of the result.

    Returns:
        ``[..., in]``.
    """
    index, count = ids.reshape(-1), weight.shape[0]
    tables = _tables(weight) if len(index) else None
    try:
        meta = None if tables is None else weight.resized(len(index)).meta()
    except UnsupportedError:
        meta = None
    if tables is None or meta is None:
        return _rows(weight, index.tolist(), dtype).view(*ids.shape, weight.shape[1])
    parts = [(table[index] if len(table) == count else table).reshape(-1) for table in tables]
    return record_of_bytes(meta, parts).dequantize(dtype).view(*ids.shape, weight.shape[1])


def _rows(weight: QuantizedTensor, indices: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Some rows as plain numbers, ``[indices, in]``."""
    if not indices:
        return torch.empty(0, weight.shape[1], dtype=dtype, device=weight.device)
    if all(weight.can_narrow(0, index, 1) for index in indices):
        return torch.cat([weight.narrow(0, index, 1).dequantize(dtype) for index in indices])
    return weight.dequantize(dtype)[indices]
