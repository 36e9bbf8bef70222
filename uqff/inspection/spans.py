"""Which bytes of a file have been read: spans that neither touch nor overlap, in order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

__all__ = ["Spans"]


class Spans:
    """Ranges of numbers. Those that touch become one, so there are seldom many, and each is found by bisection."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int) -> None:
        """Add a range; an empty one is none."""
        if begin >= end:
            return
        first, last = bisect_left(self._ends, begin), bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last], self._ends[first:last] = [begin], [end]

    def gaps(self, begin: int, end: int) -> list[tuple[int, int]]:
        """What of a range is missing, in order."""
        found = []
        for at in range(bisect_right(self._ends, begin), bisect_left(self._begins, end)):
            if begin < self._begins[at]:
                found.append((begin, self._begins[at]))
            begin = max(begin, self._ends[at])
        return [*found, (begin, end)] if begin < end else found
