"""An HQQ weight of axis 0 in pieces: its groups are columns of the weight seen as ``[group_size, N]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from uqff.families.hqq.tensor import HQQ

__all__ = ["column_tiles"]

_Record = TypeVar("_Record", bound="HQQ")


def column_tiles(weight: _Record, size: int) -> Iterator[tuple[Callable[[Any], Any], _Record]]:
    """See :meth:`QuantizedTensor.tiles`.

    Args:
        weight: of axis 0.
        size: weights of a piece, about.
    """
    group_size = weight.group_size
    groups, step = weight.numel // group_size, max(1, size // group_size)
    for start in range(0, groups, step):
        count = min(step, groups - start)

        def taken(values: Any, columns: slice = slice(start, start + count)) -> Any:
            return values.reshape(group_size, -1)[:, columns]

        cut = {}
        for name, part in weight.parts.items():
            unit = part.shape[1] // groups
            cut[name] = part.narrow(1, start * unit, count * unit)
        yield taken, weight.replaced(**cut, weight_shape=(group_size, count))
