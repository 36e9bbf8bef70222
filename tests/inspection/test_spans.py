"""Spans that have been read, against a set of all numbers, and how much work they are."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from uqff.inspection.spans import Spans

RANGES = st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda each: (each[0], each[0] + each[1]))


@given(st.lists(RANGES, max_size=12), RANGES)
def test_gaps_are_what_is_missing(added: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    """Of any ranges, in any order: the numbers that no range has, in as few gaps as there can be."""
    spans, numbers = Spans(), set[int]()
    for begin, end in added:
        spans.add(begin, end)
        numbers |= {*range(begin, end)}
    gaps = spans.gaps(*asked)
    missing = [number for begin, end in gaps for number in range(begin, end)]
    assert missing == sorted({*range(*asked)} - numbers)
    assert all(begin < end for begin, end in gaps)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(gaps))


def test_spans_that_touch_are_one() -> None:
    """So that the pieces of a file, read one after the other, are not many to look through."""
    spans = Spans()
    for at in range(1000):
        spans.add(2 * at, 2 * at + 1)
    assert (len(spans._begins), spans.gaps(5, 9)) == (1000, [(5, 6), (7, 8)])
    for at in range(1000):
        spans.add(2 * at + 1, 2 * at + 2)
    assert (spans._begins, spans._ends) == ([0], [2000])


class _Counted(int):
    """A number that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: int) -> bool:
        _Counted.compared += 1
        return int(self) < int(other)


def test_a_range_is_found_without_looking_at_all() -> None:
    """A million pieces of a hostile file are not looked through for each of them."""
    spans = Spans()
    for at in range(10_000):
        spans.add(2 * at, 2 * at + 1)
    assert spans.gaps(_Counted(10_000), _Counted(10_003)) == [(10_001, 10_002)]
    assert 0 < _Counted.compared < 60
