"""Rows of a quantised matrix in another order, exactly: whole rows change places, no code within one is touched.

A row is whole blocks or groups with their scales in GGUF, AFQ, MXFP4, Unquant and FP8 (whose one scale belongs to all),
and in F8Q8 if its length is a multiple of 32.  In HQQ the groups of axis 0 run down through the rows, so that rows
cannot change places.  torch is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from uqff.errors import ShapeError, ShardError
from uqff.families.part import Part

if TYPE_CHECKING:
    from uqff.families.base import QuantizedTensor

__all__ = ["Order", "can_reorder", "reordered", "reordered_bias"]

Order: TypeAlias = npt.NDArray[np.int64]
"""int64 ``[out]``: which row comes first, which second, ...; each once."""


_Record = TypeVar("_Record", bound="QuantizedTensor")


def can_reorder(weight: QuantizedTensor) -> bool:
    """Whether :func:`reordered` takes a weight."""
    return len(weight.shape) == 2 and weight.has_whole_rows


def reordered(weight: _Record, order: Order) -> _Record:
    """A matrix with its rows in another order, still quantised; the weight itself is not modified.

    ``reordered(w, order)`` dequantises to the bits of what ``w`` dequantises to, ``[order]``.

    Args:
        weight: ``[out, in]``; which may lack its bytes.
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
    return weight.replaced(**{name: _moved(part, order) for name, part in weight.parts.items() if part.shape})


def reordered_bias(bias: Part, order: Order) -> Part:
    """A bias ``[out]`` likewise.

    Raises:
        ShapeError: another number of rows.
    """
    if bias.shape != order.shape:
        raise ShapeError("order of another number of rows", field="bias", expected=bias.shape, got=list(order.shape))
    return _moved(bias, order)


def _moved(part: Part, order: Order) -> Part:
    """A part with its rows in order."""
    if part.is_planned:
        return part
    moved = part.array().reshape(len(order), -1)[order]
    return Part(part.dtype, part.shape, moved.reshape(-1).data)
