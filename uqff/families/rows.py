"""Rows of a quantised matrix in another order, exactly: whole rows change places, no code within one is touched.

A row is whole blocks or groups with their scales in GGUF, AFQ, MXFP4, Unquant and FP8 (whose one scale belongs to all),
and in F8Q8 if its length is a multiple of 32.  In HQQ the groups of axis 0 run down through the rows, so that rows
cannot change places.  torch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import Family
from uqff.errors import ShapeError, ShardError
from uqff.families.encoded import Encoded
from uqff.families.f8q8 import tensor as f8q8
from uqff.schema.bricks import Placeholder, Scope

__all__ = ["Order", "can_reorder", "reordered", "reordered_bias"]

Order: TypeAlias = npt.NDArray[np.int64]
"""int64 ``[out]``: which row comes first, which second, ...; each once."""


def can_reorder(weight: Encoded) -> bool:
    """Whether :func:`reordered` takes a weight."""
    if len(weight.shape) != 2 or weight.family is Family.HQQ:
        return False
    return weight.family is not Family.F8Q8 or weight.shape[1] % f8q8.BLOCK_SIZE == 0


def reordered(weight: Encoded, order: Order) -> Encoded:
    """A matrix with its rows in another order, still quantised; the weight itself is not modified.

    ``reordered(w, order)`` dequantises to the bits of what ``w`` dequantises to, ``[order]``.

    Args:
        weight: ``[out, in]``; its payloads may be placeholders.
        order: of its rows.

    Raises:
        ShapeError: another number of rows.
        ShardError: the rows of this type, or of this length, cannot change places.
    """
    if not can_reorder(weight):
        raise ShardError(
            "rows cannot change places exactly",
            expected="a matrix whose rows are whole blocks or groups",
            got=f"{weight.kind} {list(weight.shape)}",
        )
    rows = weight.shape[0]
    if order.shape != (rows,):
        raise ShapeError("order of another number of rows", expected=rows, got=list(order.shape))
    tensors = {entry.field for entry in weight.record.ENTRIES.members if entry.dims}
    return Encoded(
        weight.record,
        {name: _moved(value, order) if name in tensors else value for name, value in weight.fields.items()},
    )


def reordered_bias(bias: Scope, order: Order) -> Scope:
    """A bias ``[out]`` likewise.

    Raises:
        ShapeError: another number of rows.
    """
    if tuple(bias["shape"]) != order.shape:
        raise ShapeError("order of another number of rows", field="bias", expected=bias["shape"], got=list(order.shape))
    moved: Scope = _moved(bias, order)
    return moved


def _moved(value: Any, order: Order) -> Any:
    """A tensor, or a payload, with its rows in order; a shape stays."""
    if isinstance(value, Mapping):
        return {**value, "data": _moved(value["data"], order)}
    if isinstance(value, (Placeholder, tuple)):
        return value
    return np.frombuffer(value, np.uint8).reshape(len(order), -1)[order].reshape(-1).data
