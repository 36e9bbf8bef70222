"""Payload elements that no sound writer produces, found and named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from uqff.codes import DType
from uqff.schema.bricks import Scope

__all__ = ["PayloadProblem", "first_bad", "not_finite"]


class PayloadProblem(NamedTuple):
    """A payload element that breaks a rule: which field, at which byte of that field, and what was expected."""

    field: str
    offset: int
    problem: str
    expected: str
    got: str


_EXPONENT_BITS = {
    DType.F8E4M3: ("u1", 0x7F),
    DType.F16: ("<u2", 0x7C00),
    DType.BF16: ("<u2", 0x7F80),
    DType.F32: ("<u4", 0x7F800000),
    DType.F64: ("<u8", 0x7FF0000000000000),
}
"""The bits that are all set in infinities and NaNs; of e4m3, which has no infinity, all but the sign."""

_LOOKED_AT = 2**20
"""Elements that are looked at together: a layer may have billions, and each look takes memory."""


def not_finite(record: Scope, field: str) -> Iterator[PayloadProblem]:
    """Report the first element of a tensor record that is infinite or not a number. Integers have none."""
    dtype: DType = record["dtype"]
    if dtype not in _EXPONENT_BITS:
        return
    code, mask = _EXPONENT_BITS[dtype]
    bits = np.frombuffer(record["data"], code)
    count, first = 0, 0
    for at in range(0, len(bits), _LOOKED_AT):
        bad = (bits[at : at + _LOOKED_AT] & mask) == mask
        found = int(np.count_nonzero(bad))
        first = at + int(np.argmax(bad)) if found and not count else first
        count += found
    yield from _problems(count, first, field, dtype.itemsize, "a finite number")


def first_bad(
    bad: np.ndarray[Any, np.dtype[np.bool_]], field: str, stride: int, expected: str
) -> Iterator[PayloadProblem]:
    """Report how many elements are bad, and where the first is."""
    yield from _problems(int(np.count_nonzero(bad)), int(np.argmax(bad)) if bad.size else 0, field, stride, expected)


def _problems(count: int, first: int, field: str, stride: int, expected: str) -> Iterator[PayloadProblem]:
    if count:
        what = "1 element breaks a rule" if count == 1 else f"{count} elements break a rule"
        yield PayloadProblem(field, first * stride, what, expected, f"element {first}")
