"""Rows of a quantised matrix in another order, exactly: whole rows change places, no code within one is touched.

A row is whole blocks or groups with their scales in GGUF, AFQ, MXFP4, Unquant and FP8 (whose one scale belongs to all),
and in F8Q8 if its length is a multiple of 32.  In HQQ the groups of axis 0 run down through the rows, so that rows
cannot change places.  torch is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from uqff.errors import ShapeError, ShardError
from uqff.families.part import Part, joined

if TYPE_CHECKING:
    from uqff.families.base import QuantizedTensor

__all__ = ["Order", "can_reorder", "joined_rows", "reordered", "reordered_bias", "reordered_columns"]

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


def reordered_columns(weight: _Record, order: Order) -> _Record:
    """A matrix with the columns of all rows in another order, by runs of as many, still quantised; new memory.

    Args:
        weight: ``[out, in]``, whose runs of ``in / len(order)`` columns are whole blocks or groups; which may lack its
            bytes.
        order: which run comes first, which second, ...

    Raises:
        ShardError: the rows of this type do not stand by themselves, or runs are no whole blocks.
    """
    rows, columns = weight.shape
    if not can_reorder(weight) or columns % len(order) or (columns // len(order)) % weight.alignment(1):
        raise ShardError(
            "columns cannot change places exactly",
            expected=f"{len(order)} runs of whole blocks or groups",
            got=f"{weight.kind} {[rows, columns]}",
        )
    return weight.replaced(
        **{name: _runs_moved(part, order) for name, part in weight.parts.items() if part.shape[:1] == (rows,)}
    )


def joined_rows(records: Sequence[_Record], *, turns: bool) -> _Record:
    """Weights of one type as one weight with the rows of all, still quantised; new memory.

    Args:
        records: ``[..., out, in]`` each, all of one shape if their rows take turns; which may lack their bytes.
        turns: whether the first rows of all come first, then the second ones, ...; if not, one weight follows another.

    Raises:
        ShapeError: other shapes than that.
        ShardError: weights of several types, or of one whose rows do not stand by themselves.
    """
    first = records[0]
    if any(not each.has_whole_rows or each.kind != first.kind for each in records):
        raise ShardError(
            "weights cannot be put together exactly",
            expected="one type, whose rows are whole blocks or groups",
            got=", ".join(each.kind for each in records),
        )
    shapes = [each.shape if turns else (*each.shape[:-2], each.shape[-1]) for each in records]
    if any(shape != shapes[0] for shape in shapes):
        raise ShapeError("weights of several shapes", expected=list(shapes[0]), got=[list(each) for each in shapes])
    dim = len(first.shape) - 2
    names = [name for name, part in first.parts.items() if part.shape]
    for name in vars(first):
        if name not in names and not all(first.same_in(each, name) for each in records[1:]):
            raise ShardError("weights cannot be put together exactly", field=name, expected="the same in all")
    parts = {name: joined([each.parts[name] for each in records], dim) for name in names}
    if turns:
        parts = {name: _dealt(part, dim, len(records)) for name, part in parts.items()}
    return first.replaced(**parts)


def _dealt(part: Part, dim: int, count: int) -> Part:
    """A part of several weights, one after the other, with their rows in turns."""
    if part.is_planned:
        return part
    rows = part.shape[dim] // count
    dealt = part.array().reshape(math.prod(part.shape[:dim]), count, rows, -1).swapaxes(1, 2)
    return Part(part.dtype, part.shape, np.ascontiguousarray(dealt).reshape(-1).data)


def reordered_bias(bias: Part, order: Order) -> Part:
    """A bias ``[out]`` likewise.

    Raises:
        ShapeError: another number of rows.
    """
    if bias.shape != order.shape:
        raise ShapeError("order of another number of rows", field="bias", expected=bias.shape, got=list(order.shape))
    return _moved(bias, order)


def _runs_moved(part: Part, order: Order) -> Part:
    if part.is_planned:
        return part
    moved = part.array().reshape(part.shape[0], len(order), -1)[:, order]
    return Part(part.dtype, part.shape, np.ascontiguousarray(moved).reshape(-1).data)


def _moved(part: Part, order: Order) -> Part:
    """A part with its rows in order."""
    if part.is_planned:
        return part
    moved = part.array().reshape(len(order), -1)[order]
    return Part(part.dtype, part.shape, moved.reshape(-1).data)
