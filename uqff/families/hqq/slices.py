"""What a slice of an HQQ weight is as a weight: its groups, and where each of them comes from.

A slice is one range in each run of the flattened weight (:func:`~uqff.families.slicing.runs`).  It is an HQQ weight
again if its elements can be laid out in a matrix M' in which each group has one scale and whose rows pack:

* axis 0: M' is as wide as the pattern of columns repeats.  Runs that fill rows of M whole, or ranges that skip whole
  rows, leave the columns as they are; else the pattern repeats when runs begin in the same column again.  Narrower
  matrices would put two columns into one, so this one decides.
* axis 1: groups are cut into equal parts none of which crosses the edge of a group, run or range.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from uqff.families.slicing import runs
from uqff.numerics.packing import PLANES

if TYPE_CHECKING:
    import numpy.typing as npt

    from uqff.families.hqq.tensor import HQQ

__all__ = ["layout_of", "origin_of", "packs"]


def packs(rows: int, bits: int) -> bool:
    """Whether so many rows fill their words; those of 3 bits are padded."""
    return bits == 3 or rows % PLANES[bits] == 0


def layout_of(weight: HQQ, dim: int, start: int, length: int) -> tuple[int, int]:
    """Group size and number of groups of a slice; whether it packs is not asked."""
    count, run, step = runs(weight.shape, dim)
    size, groups = length * step, weight.numel // weight.group_size
    if weight.axis == 0:
        columns = groups if (run - size) % groups == 0 else groups // math.gcd(groups, run) * size
        return count * size // columns, columns
    part = math.gcd(weight.group_size, start * step, size, run if count > 1 else 0)
    while part % 2 == 0 and not packs(count * size // part, weight.bits):
        part //= 2
    return part, count * size // part


def origin_of(weight: HQQ, dim: int, start: int, length: int, size: int, groups: int) -> npt.NDArray[np.int64]:
    """The group of a weight that each group of its slice comes from, ``[groups]``.

    Args:
        weight: the whole.
        dim: of the slice, as are ``start`` and ``length``.
        start: its first index.
        length: its indices.
        size: its group size.
        groups: its number of groups.
    """
    _, run, step = runs(weight.shape, dim)
    first = np.arange(groups) * (1 if weight.axis == 0 else size)
    flat = first // (length * step) * run + start * step + first % (length * step)
    return flat % (weight.numel // weight.group_size) if weight.axis == 0 else flat // weight.group_size
