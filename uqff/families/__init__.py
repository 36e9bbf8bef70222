"""The families, by the type byte of a blob and by the names of their types."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from uqff import codes
from uqff.codes import Family
from uqff.families.afq.tensor import AFQ
from uqff.families.base import QuantizedTensor
from uqff.families.f8q8.tensor import F8Q8
from uqff.families.fp8.tensor import FP8
from uqff.families.gguf.tensor import GGUF
from uqff.families.hqq.tensor import HQQ
from uqff.families.mxfp4.tensor import MXFP4
from uqff.families.stacking import stack
from uqff.families.unquant.tensor import Unquant

__all__ = [
    "AFQ",
    "F8Q8",
    "FAMILIES",
    "FP8",
    "GGUF",
    "HQQ",
    "MXFP4",
    "PLAIN_KIND",
    "Family",
    "QuantizedTensor",
    "Unquant",
    "families",
    "family_of",
    "family_of_kind",
    "registered",
    "stack",
]

FAMILIES: tuple[type[QuantizedTensor], ...] = (GGUF, Unquant, HQQ, FP8, AFQ, F8Q8, MXFP4)
"""The record of each family, in the order of their type bytes."""

PLAIN_KIND: str = Unquant.OTHER_KINDS[0]
"""The type of weights that are not quantised, as it can be asked for."""

_EXTRA: list[type[QuantizedTensor]] = []

for _record in FAMILIES:
    codes.add_family(_record.family)


def families() -> tuple[type[QuantizedTensor], ...]:
    """The records of all families, those of :func:`registered` among them."""
    return (*FAMILIES, *_EXTRA)


def family_of(family: int) -> type[QuantizedTensor]:
    """The record of a family.

    Raises:
        KeyError: it is not known.
    """
    for record in families():
        if record.family == family:
            return record
    raise KeyError(family)


def family_of_kind(kind: str) -> type[QuantizedTensor] | None:
    """The record of the family that has a type, by the type's name; None if there is none."""
    return next((record for record in families() if record.has_kind(kind)), None)


@contextmanager
def registered(record: type[QuantizedTensor]) -> Iterator[None]:
    """Know one more family within a ``with`` statement: one under work, or one of somebody's own.

    Raises:
        ValueError: its type byte or one of its types is taken.
    """
    kinds = (*record.KINDS, *record.OTHER_KINDS, *record.RESULTS)
    taken = [kind for kind in kinds if family_of_kind(kind) is not None]
    if taken:
        raise ValueError(f"there is a family with types of that name: {', '.join(taken)}")
    codes.add_family(record.family)
    _EXTRA.append(record)
    try:
        yield
    finally:
        _EXTRA.remove(record)
        codes.remove_family(record.family)
