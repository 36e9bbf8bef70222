"""What slices of all families share: parts that are cut like the weight, and ranges of the flattened weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from uqff.errors import ShardError
from uqff.families.part import joined

if TYPE_CHECKING:
    from uqff.families.base import QuantizedTensor

__all__ = ["join_parts", "narrow_parts", "row_tiles", "runs"]

_Record = TypeVar("_Record", bound="QuantizedTensor")


def narrow_parts(record: _Record, dim: int, start: int, length: int, unit: int, **per_unit: int) -> _Record:
    """Cut parts that have the record's dimensions, the last one in other units.

    Args:
        record: the record.
        dim: which dimension.
        start: first element.
        length: number of elements.
        unit: elements of the last dimension that belong together.
        per_unit: elements of each part for one unit.
    """
    last = dim == len(record.shape) - 1
    changed = {}
    for name, count in per_unit.items():
        begin, n = (start // unit * count, length // unit * count) if last else (start, length)
        changed[name] = record.parts[name].narrow(dim, begin, n)
    return record.replaced(**changed)


def join_parts(slices: list[tuple[int, _Record]], dim: int, *names: str) -> _Record:
    """Join the named parts; everything else must be the same in all slices, and is kept.

    Raises:
        ShardError: the slices differ in something else, like the one scale of a tensor.
    """
    first = slices[0][1]
    for name in vars(first):
        if name not in names and not all(first.same_in(each, name) for _, each in slices[1:]):
            raise ShardError("slices were not cut from one weight", field=name, expected="the same in every slice")
    return first.replaced(**{name: joined([each.parts[name] for _, each in slices], dim) for name in names})


def runs(shape: tuple[int, ...], dim: int) -> tuple[int, int, int]:
    """A slice along ``dim`` in the flattened weight is one range in each of several runs.

    Returns:
        How many runs there are, their length, and the length for one step along ``dim``.
    """
    inner = math.prod(shape[dim + 1 :])
    return math.prod(shape[:dim]), shape[dim] * inner, inner


def row_tiles(record: _Record, size: int) -> Iterator[tuple[Callable[[Any], Any], _Record]]:
    """:meth:`QuantizedTensor.tiles` of a weight whose parts have its rows, but for those without dimensions."""
    columns = record.shape[-1]
    count, step = record.numel // columns, max(1, size // columns)
    whole = {
        name: part.view((math.prod(part.shape[:-1]), part.shape[-1]))
        for name, part in record.parts.items()
        if part.shape
    }
    for start in range(0, count, step):
        stop = min(start + step, count)

        def taken(values: Any, rows: slice = slice(start, stop)) -> Any:
            return values.reshape(-1, columns)[rows]

        yield taken, record.replaced(**{name: part.narrow(0, start, stop - start) for name, part in whole.items()})
