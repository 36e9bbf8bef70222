"""Where a layer is: on which ranks, and what constructors are told about it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch

    from uqff.parallel.shard import Shard

__all__ = ["DistributedKind", "Placement"]


class DistributedKind(enum.Enum):
    """How a layer is partitioned over ranks.

    Example:
        >>> import torch
        >>> uqff.parallel.RowParallelLayer(torch.ones(2, 2)).is_distributed().value
        'row-parallel'
    """

    COLUMN_PARALLEL = "column-parallel"
    ROW_PARALLEL = "row-parallel"
    REPLICATED = "replicated"


class Placement(TypedDict, total=False):
    """What a constructor of a layer takes besides a weight and the ranks, as keywords; all may be left out.

    Attributes:
        shard: the slice, if it is not the rank's equal part.
        device: where the slice goes; it stays a view of the weight, where it can be one, if None.
        key: of the layer in its file, for errors.
        version: that blobs are written with; that of the blob that the layer comes from, if there is one.
    """

    shard: Shard | None
    device: torch.device | str | None
    key: str | None
    version: tuple[int, int, int]
